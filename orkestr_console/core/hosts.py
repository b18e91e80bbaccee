"""Clients of the host agent, and the translation of its errors into domain errors."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any, cast

from asgiref.sync import async_to_sync
from django.conf import settings

from hostruntime import errors as host_errors
from hostruntime.client.async_host_client import AsyncHostClient, async_host_client
from hostruntime.client.host_client import HostClient, host_client
from orkestr_console.core.errors import (
    Conflict,
    DomainError,
    ExecKilled,
    ExecTimeout,
    FleetFull,
    HostUnavailable,
    Internal,
    InvalidInput,
    NotFound,
)
from orkestr_console.core.postgres import release_before_waiting

# Of the current request: set once its client has disconnected (orkestr_console.http.handler).
client_gone: ContextVar[threading.Event | None] = ContextVar("client_gone", default=None)


class ReleasingClient:
    """A client of the host agent that never blocks while holding a database connection.

    A call to the host may take arbitrarily long, so the connection returns to the pool before each
    call, and before each piece of a streamed answer. Inside a transaction this is impossible, and
    raises ``ConnectionHeldError``.
    """

    def __init__(self, client: HostClient) -> None:
        self._client = client

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self._client, name)

        @wraps(method)
        def call(*args: Any, **kwargs: Any) -> Any:
            release_before_waiting()
            answer = method(*args, **kwargs)
            return stream_pieces(answer) if isinstance(answer, Iterator) else answer

        return call


def stream_pieces[T](answer: Iterator[T]) -> Iterator[T]:
    """The pieces of a streamed answer, each awaited without a database connection."""
    while True:
        release_before_waiting()
        try:
            piece = next(answer)
        except StopIteration:
            return
        yield piece


def host() -> HostClient:
    """This process's client of the host agent, as a :class:`ReleasingClient`."""
    return cast("HostClient", ReleasingClient(host_client(settings.HOST_SOCKET)))


def async_host() -> AsyncHostClient:
    """The running event loop's client of the host agent.

    For services under :func:`run_async`, and for streams, whose readers hold no connection.
    """
    return async_host_client(settings.HOST_SOCKET)


def run_async[**P, R](
    call: Callable[P, Coroutine[Any, Any, R]], *args: P.args, **kwargs: P.kwargs
) -> R:
    """Run a coroutine on the server's event loop, and wait for its result in this thread.

    Without a database connection, as in :class:`ReleasingClient`. It is cancelled when the client
    disconnects, and not begun if it has: raises ``asyncio.CancelledError``.
    """
    release_before_waiting()
    gone = client_gone.get()

    async def unless_gone() -> R:
        # On the event loop, which notices disconnects: from here on, it cancels this.
        if gone is not None and gone.is_set():
            raise asyncio.CancelledError
        return await call(*args, **kwargs)

    return async_to_sync(unless_gone)()


@contextmanager
def translated_errors() -> Iterator[None]:
    """Raise the host's errors as the matching domain errors."""
    try:
        yield
    except host_errors.HostError as error:
        raise translate_error(error) from error


def translate_error(error: host_errors.HostError) -> DomainError:
    """The domain error for a host error: the same code and message, by class."""
    match error:
        case host_errors.HostFull():
            return FleetFull()
        case host_errors.Held():
            return HostUnavailable(error.detail)
        case host_errors.HostUnavailable():
            return HostUnavailable()
        case host_errors.ExecTimeout():
            return ExecTimeout(error.detail)
        case host_errors.ExecKilled():
            return ExecKilled(error.detail, signal=error.signal)
        case host_errors.ContainerGone():
            return Conflict(
                "The sandbox has ended; create another one.", code="sandbox_not_running"
            )
        case host_errors.NotFound():
            return NotFound(error.detail, code=error.code)
        case host_errors.FileTooLarge():
            # 413, as the file is the call's payload.
            return DomainError(error.detail, code="payload_too_large")
        case host_errors.Conflict():
            return Conflict(error.detail, code=error.code)
        case host_errors.InvalidRequest():
            return InvalidInput(error.detail, code=error.code)
    return Internal()

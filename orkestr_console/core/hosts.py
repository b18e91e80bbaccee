"""The way to the host agent, and how its errors are told to people."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, cast

from asgiref.sync import async_to_sync
from django.conf import settings

from hostruntime import errors as host_errors
from hostruntime.client.host_client import (
    AsyncHostClient,
    HostClient,
    async_host_client,
    host_client,
)
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
from orkestr_console.core.postgres import before_waiting


class Waiting:
    """A client of the host agent that is never waited for with a database connection in hand.

    What a host is asked takes as long as it takes, so the connection goes back to the pool before
    each call, and before each piece of what a call answers piece by piece. Inside of a transaction
    that cannot be, and raises ``ConnectionHeldError``.
    """

    def __init__(self, client: HostClient) -> None:
        self._client = client

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self._client, name)

        @wraps(method)
        def asking(*args: Any, **kwargs: Any) -> Any:
            before_waiting()
            answer = method(*args, **kwargs)
            return pieces(answer) if isinstance(answer, Iterator) else answer

        return asking


def pieces[T](answer: Iterator[T]) -> Iterator[T]:
    """What comes piece by piece, each waited for with nothing in hand."""
    while True:
        before_waiting()
        try:
            piece = next(answer)
        except StopIteration:
            return
        yield piece


def host() -> HostClient:
    """This process's client of the host agent, asked as :class:`Waiting` says."""
    return cast("HostClient", Waiting(host_client(settings.HOST_SOCKET)))


def async_host() -> AsyncHostClient:
    """The running event loop's client of the host agent. A service comes here by :func:`awaited`.

    Or by a stream, whose reader holds nothing.
    """
    return async_host_client(settings.HOST_SOCKET)


def awaited[**P, R](
    call: Callable[P, Coroutine[Any, Any, R]], *args: P.args, **kwargs: P.kwargs
) -> R:
    """What a coroutine of the server's event loop answers, waited for in this thread.

    With nothing in hand, as :class:`Waiting` says. It is cancelled when the client goes away.
    """
    before_waiting()
    return async_to_sync(call)(*args, **kwargs)


@contextmanager
def errors_told() -> Iterator[None]:
    """Raise what the host refuses as the domain error that says the same."""
    try:
        yield
    except host_errors.HostError as error:
        raise told(error) from error


def told(error: host_errors.HostError) -> DomainError:
    """The domain error for a host error: same code and sentence, by class."""
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
            # 413, as the file is what the call carries.
            return DomainError(error.detail, code="payload_too_large")
        case host_errors.Conflict():
            return Conflict(error.detail, code=error.code)
        case host_errors.InvalidRequest():
            return InvalidInput(error.detail, code=error.code)
    return Internal()

"""Clients of the host agent, and the translation of its errors into domain errors.

A service that asks the host is written as *steps*: a generator that yields each call, and is sent
the answer. Called like any function, it waits for the host in the caller's thread; the server runs
it step by step (:mod:`orkestr_console.http.steps`), and keeps neither a thread nor a database
connection between them::

    @in_steps
    def rename(actor: Actor, sandbox_id: str) -> Steps[int]:
        sandbox = find(actor, sandbox_id)
        info = yield from ask(HostClient.sandbox, sandbox.pk)
        ...
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Generator, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial, update_wrapper, wraps
from typing import Any, Concatenate, NamedTuple, cast

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
    RangeNotSatisfiable,
    RateLimited,
)
from orkestr_console.core.postgres import release_before_waiting

# When another transfer may be tried: how long one takes, nobody knows.
TRANSFER_RETRY_SECONDS = 5

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


class Ask(NamedTuple):
    """A call of the host, by the name of the client's method."""

    method: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


@dataclass(frozen=True)
class Done[R]:
    """The end of steps, and their result."""

    value: R


# A step may also wait for anything else that somebody else does.
type Wait = Ask | Future[None]
type Steps[R] = Generator[Wait, Any, R]


def ask[**P, R](
    method: Callable[Concatenate[HostClient, P], R], *args: P.args, **kwargs: P.kwargs
) -> Steps[R]:
    """A step that calls the host: ``yield from ask(HostClient.sandbox, id)``.

    Raises the host's errors, and ``ConnectionHeldError`` inside a transaction.
    """
    return cast("R", (yield Ask(method.__name__, args, kwargs)))


class Service[**P, R]:
    """A service in steps: a function that runs them in the caller's thread.

    ``steps`` starts them for another way of waiting.
    """

    def __init__(self, steps: Callable[P, Steps[R]]) -> None:
        update_wrapper(self, steps)
        self.steps = steps

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run it, waiting for the host in this thread."""
        return run_here(self.steps(*args, **kwargs))


def in_steps[**P, R](steps: Callable[P, Steps[R]]) -> Service[P, R]:
    """Decorate a service that is written as steps."""
    return Service(steps)


def run_here[R](steps: Steps[R]) -> R:
    """Run steps in this thread, which waits for the host. Raises what they raise."""
    resume: Callable[[], Wait] = partial(next, steps)
    while True:
        reached: Wait | Done[R] = advance(resume)
        if isinstance(reached, Done):
            return reached.value
        try:
            answer = wait_here(reached)
        except Exception as error:  # noqa: BLE001 - it is the answer
            resume = partial(steps.throw, error)
        else:
            resume = partial(steps.send, answer)


def wait_here(reached: Wait) -> Any:
    """What a step waits for, in this thread. Raises the host's errors."""
    if isinstance(reached, Future):
        return reached.result()
    return getattr(host(), reached.method)(*reached.args, **reached.kwargs)


def advance[R](resume: Callable[[], Wait]) -> Wait | Done[R]:
    """Run one step; what it waits for, or its result if it was the last.

    The thread has no database connection afterwards. Raises ``ConnectionHeldError`` in a
    transaction, and what the step raises.
    """
    try:
        reached = resume()
    except StopIteration as end:
        return Done(end.value)
    release_before_waiting()
    return reached


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
        case host_errors.ContainerPaused():
            # As the services say it, where the row was read a moment later.
            return Conflict(error.detail, code="sandbox_not_running")
        case host_errors.NotFound():
            return NotFound(error.detail, code=error.code)
        case host_errors.RangeNotSatisfiable():
            return RangeNotSatisfiable(error.detail, error.size)
        case host_errors.TooManyTransfers():
            return RateLimited(error.detail, retry_after=TRANSFER_RETRY_SECONDS)
        case host_errors.FileTooLarge():
            # 413, as the file is the call's payload.
            return DomainError(error.detail, code="payload_too_large")
        case host_errors.Conflict():
            return Conflict(error.detail, code=error.code)
        case host_errors.InvalidRequest():
            return InvalidInput(error.detail, code=error.code)
    return Internal()

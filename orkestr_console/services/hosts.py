"""The way to the host agent, and how its errors are told to people."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from django.conf import settings

from hostruntime import errors as host_errors
from hostruntime.client import AsyncHostClient, HostClient, async_host_client, host_client
from orkestr_console.errors import (
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


def host() -> HostClient:
    """This process's client of the host agent."""
    return host_client(settings.HOST_SOCKET)


def async_host() -> AsyncHostClient:
    """The running event loop's client of the host agent."""
    return async_host_client(settings.HOST_SOCKET)


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

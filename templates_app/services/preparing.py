"""Builds on a base that is made on request: they wait for it, and tell how far it is.

The host makes it once for all who wait, and goes on without them. So a driver that dies with its
worker, or loses the host, is followed by one that joins in.
"""

from __future__ import annotations

from collections.abc import Callable

from hostruntime import errors as host_errors
from hostruntime.client.host_client import HostClient
from hostruntime.wire.images import BaseInfo
from templates_app.models import Template
from templates_app.services.record import (
    BASE_EVENT,
    record_base,
    record_waited,
    require_driver,
)

# More steps than any base has; what else it says is not worth an event for each build.
MAX_MESSAGES = 50


class BaseFailed(Exception):  # noqa: N818 - not an error of this program
    """The base could not be made; the text says why."""


def prepare_base(
    client: HostClient, template: Template, driver: str, heard: Callable[[], None]
) -> None:
    """Wait for a build's base, if that is made on request and is not there yet.

    Calls ``heard`` whenever the host says something meanwhile.

    Raises :class:`BaseFailed`, :class:`~templates_app.services.record.Superseded` and
    ``HostUnavailable``, after which it can be called again.
    """
    name = template.base_image
    base = find_base(client, name)
    if base is None or not base.on_request or base.state == "ready":
        return
    told = set(template.events.filter(kind=BASE_EVENT).values_list("payload__message", flat=True))

    def tell(message: str) -> None:
        if message not in told and len(told) < MAX_MESSAGES:
            told.add(message)
            record_base(template, driver, message)

    tell(f"Preparing base {name}…")
    try:
        for line in client.ensure_base(name):
            heard()
            if line.message:
                tell(line.message)
            else:
                require_driver(template, driver)
    except host_errors.HostError as error:
        # Its failure, or the connection's?
        base = find_base(client, name)
        if base is not None and base.state == "failed":
            raise BaseFailed(base.error or error.detail) from error
        raise
    record_waited(template, driver)


def find_base(client: HostClient, name: str) -> BaseInfo | None:
    """A built-in base's state; None if it is no base's name. Raises ``HostUnavailable``."""
    return next((base for base in client.bases() if base.name == name), None)

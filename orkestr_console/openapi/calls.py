"""Every public call, from the table of addresses."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from django.urls import get_resolver

from orkestr_console.http.decorators import SCOPE, VIEWS
from orkestr_console.http.describing import Operation, operation_of
from orkestr_console.http.rest import addresses, serves

PARAMETER = re.compile(r"<str:([a-z_]+)>")


@dataclass(frozen=True)
class Group:
    """Calls that belong together, by their addresses."""

    name: str
    about: str
    addresses: re.Pattern[str]


# The first that matches.
GROUPS = tuple(
    Group(name, about, re.compile(addresses))
    for name, about, addresses in (
        (
            "Templates",
            "Images that sandboxes start from, and their builds.",
            r"/v1/(?:templates.*|bases)",
        ),
        (
            "Sandboxes",
            "Containers that people use until a deadline.",
            r"/v1/sandboxes(?:/limits"
            r"|/{[a-z_]+}(?:/(?:timeout|pause|resume|metrics|egress|host))?)?",
        ),
        ("Snapshots", "The files of a sandbox at one moment.", r"/v1/sandboxes/.*snapshots.*"),
        ("Webhooks", "Addresses that are told of events.", r"/v1/sandboxes/webhooks.*"),
        ("Volumes", "Storage that outlives sandboxes.", r"/v1/sandboxes/volumes.*"),
        ("Files", "The files of a sandbox.", r"/v1/sandboxes/{[a-z_]+}/files.*|/v1/transfers/.*"),
        (
            "Commands",
            "Commands in a sandbox, waited for or in the background.",
            r"/v1/sandboxes/{[a-z_]+}/(?:exec|commands.*)",
        ),
        ("Code", "Code in persistent kernels.", r"/v1/sandboxes/{[a-z_]+}/code.*"),
        ("Account", "Who is calling, one's tokens, and signing in.", r"/api/.*"),
        ("Server", "This document, and the state of the server.", r"/v1/openapi\.json|/[a-z]+"),
    )
)


@dataclass(frozen=True)
class Call:
    """One method of one address, as in ``/v1/sandboxes/{sandbox_id}``."""

    method: str
    path: str
    view: Callable[..., Any]

    @property
    def name(self) -> str:
        """The name of the view, by which documents and clients know the call."""
        return str(getattr(self.view, "__name__", ""))

    @property
    def operation(self) -> Operation | None:
        """What is said above the view."""
        return operation_of(self.view)

    @property
    def scope(self) -> str | None:
        """What its token has to have; None if it needs no token."""
        return getattr(self.view, SCOPE, None)

    @property
    def parameters(self) -> list[str]:
        """The parameters of the address."""
        return re.findall(r"{([a-z_]+)}", self.path)

    @property
    def group(self) -> Group | None:
        """What it belongs to."""
        return next((each for each in GROUPS if each.addresses.fullmatch(self.path)), None)


def calls() -> Iterator[Call]:
    """All of them, in the order of the table."""
    for address, view in addresses(get_resolver().url_patterns, "/"):
        if not serves(address):
            continue
        path = PARAMETER.sub(r"{\1}", address)
        for method, each in getattr(view, VIEWS, {"GET": view}).items():
            yield Call(method, path, each)

"""The host names of previews: ``<port>-<ulid>.<base>``, and where the base comes from.

By default that is ``localhost`` with a port of its own: browsers take every name below it for this
machine, without DNS (RFC 6761, 6.3), and every such name for a site of its own. An operator who has
a wildcard domain sets ``ORKESTR_PREVIEW_BASE``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from orkestr_console.core.ids import is_id

PORT_VARIABLE, BASE_VARIABLE = "ORKESTR_PREVIEW_PORT", "ORKESTR_PREVIEW_BASE"
OFF = "off"
LOCAL = "localhost"
MAX_PORT = 65535
_DEFAULT_PORTS = {"http": 80, "https": 443}
# Names of DNS (RFC 1123, 2.1) that are no addresses: those have no names below them.
_NAME = re.compile(
    r"(?:[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?\.)*[a-z](?:[a-z0-9-]{0,61}[a-z0-9])?", re.ASCII
)
_LABEL = re.compile(r"([1-9][0-9]{0,4})-([0-9a-hjkmnp-tv-z]{26})", re.ASCII)


@dataclass(frozen=True)
class PreviewTarget:
    """What a host name means: a port of a sandbox. ``host`` is the name itself, in lower case."""

    sandbox_id: str
    port: int
    host: str


@dataclass(frozen=True)
class PreviewBase:
    """What all host names of previews have in common; ``authority`` has a port if needed."""

    scheme: str
    authority: str

    @property
    def is_secure(self) -> bool:
        """Whether browsers reach it over TLS, which a proxy in front ends."""
        return self.scheme == "https"

    @property
    def name(self) -> str:
        """The host name without a port."""
        return self.authority.partition(":")[0]

    @property
    def is_local(self) -> bool:
        """Whether only browsers on this machine reach it."""
        return self.name == LOCAL or self.name.endswith(f".{LOCAL}")

    @property
    def is_told_of_pages(self) -> bool:
        """Whether browsers say whose page made a request (Fetch Metadata, 2: trustworthy URLs)."""
        return self.is_secure or self.is_local

    def suffix(self, sandbox_id: str) -> str:
        """The host of a sandbox without its port: ``<ulid>.<base>``."""
        return f"{sandbox_id.removeprefix('sbx_').lower()}.{self.authority}"

    def host(self, sandbox_id: str, port: int) -> str:
        """The host of one port: ``<port>-<ulid>.<base>``."""
        return f"{port}-{self.suffix(sandbox_id)}"

    def read(self, host: str) -> PreviewTarget | None:
        """What the ``Host`` of a request means; None unless it is exactly one of ours."""
        host = host.lower()
        label, dot, rest = host.partition(".")
        found = _LABEL.fullmatch(label)
        if not dot or rest != self.authority or found is None:
            return None
        sandbox_id, port = f"sbx_{found[2].upper()}", int(found[1])
        if port > MAX_PORT or not is_id("sbx", sandbox_id):
            return None
        return PreviewTarget(sandbox_id, port, host)


def preview_port(environment: Mapping[str, str], console_port: int) -> int | None:
    """The port that the front listens on, by default the one after the console's; None for none.

    Raises ``ValueError`` with the fix.
    """
    text = environment.get(PORT_VARIABLE) or ""
    if not text:
        return console_port + 1 if console_port < MAX_PORT else console_port - 1
    if text == OFF:
        return None
    is_number = text.isascii() and text.isdigit() and len(text) <= len(str(MAX_PORT))
    if not is_number or not 0 < int(text) <= MAX_PORT:
        raise ValueError(
            f"{PORT_VARIABLE} is {text!r}: give a number between 1 and 65535, or `off`"
        )
    if int(text) == console_port:
        raise ValueError(f"{PORT_VARIABLE} is the console's own port: give another")
    return int(text)


def preview_base(environment: Mapping[str, str], port: int | None) -> PreviewBase | None:
    """The base that the environment configures; None where nothing serves previews.

    A bare name is one that a proxy in front serves over TLS. Raises ``ValueError`` with the fix.
    """
    text = (environment.get(BASE_VARIABLE) or "").strip().rstrip("/")
    if port is None:
        return None
    if not text:
        return PreviewBase("http", f"{LOCAL}:{port}")
    parts = urlsplit(text if "://" in text else f"https://{text}")
    try:
        name, own_port = parts.hostname or "", parts.port
    except ValueError:
        name, own_port = "", None
    plain = not (parts.path or parts.query or parts.fragment or parts.username or parts.password)
    if not plain or parts.scheme not in _DEFAULT_PORTS or _NAME.fullmatch(name) is None:
        raise ValueError(
            f"{BASE_VARIABLE} is {text!r}: give a domain such as previews.example.com, whose every "
            "subdomain leads here, or its address, such as http://previews.example.com:8001"
        )
    if own_port in {None, _DEFAULT_PORTS[parts.scheme]}:
        return PreviewBase(parts.scheme, name)
    return PreviewBase(parts.scheme, f"{name}:{own_port}")

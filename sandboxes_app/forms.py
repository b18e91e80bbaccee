"""The forms of a new sandbox, a snapshot and a command."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

from django.http import QueryDict

from orkestr_console.accounts.limits import Envelope
from orkestr_console.core.allowlist import extend_default
from orkestr_console.core.environment import parse_environment
from orkestr_console.core.errors import Conflict, DomainError, InvalidInput, NotFound
from orkestr_console.core.script import unix_lines
from orkestr_console.http.validation import parse_spec
from orkestr_console.ui.forms import FORM_ERROR, Form
from sandboxes_app.specs import SIZES, BackgroundSpec, ExecSpec, SandboxSpec, SnapshotSpec

LIFETIMES = (300, 600, 1800, 3600, 6 * 3600, 12 * 3600, 24 * 3600)
COMMAND_SECONDS = "60"


@dataclass(frozen=True)
class SizeChoice:
    """A size, and whether the team may use it."""

    key: str
    cpu: int
    memory_gb: int
    allowed: bool


def sizes(allowed: Envelope) -> list[SizeChoice]:
    """All sizes, smallest first."""
    return [
        SizeChoice(key, int(cpu), memory_mb // 1024, key in allowed.sizes)
        for key, (cpu, memory_mb) in SIZES.items()
    ]


def lifetimes(allowed: Envelope, chosen: str) -> list[int]:
    """The lifetimes to choose from, in seconds: those within the limit, and the one chosen."""
    longest = allowed.value("max_timeout_seconds")
    allowed_lifetimes = {length for length in LIFETIMES if length <= longest}
    typed = {int(chosen)} if chosen.isascii() and chosen.isdigit() and len(chosen) < 9 else set()
    return sorted(allowed_lifetimes | {longest} | typed)


@dataclass
class SandboxForm(Form):
    """The *New sandbox* form."""

    template: str = ""
    size: str = "small"
    network: str = "off"
    timeout_seconds: str = "600"
    # What happens when the lifetime is over, and whether a call resumes it while it is paused.
    on_timeout: str = "kill"
    auto_resume: bool = False
    preview_auth: bool = False
    env: str = ""
    # Host names, separated by spaces, that it may reach in addition to the default list.
    allow_domains: str = ""
    volume: str = ""

    # The field with the error of what it starts from.
    origin_field: ClassVar[str] = "template"
    labels: ClassVar[Mapping[str, str]] = {
        "template": "The template",
        "size": "The size",
        "network": "The network",
        "timeout_seconds": "The lifetime",
        "on_timeout": "What happens then",
        "env": "The environment",
        "allow_domains": "The list of hosts",
        "volume": "The volume",
    }

    @classmethod
    def from_post(cls, data: QueryDict) -> Self:
        """A form from posted data. Browsers end lines with CR LF."""
        return cls(
            template=data.get("template", ""),
            size=data.get("size", ""),
            network=data.get("network", ""),
            timeout_seconds=data.get("timeout_seconds", "").strip(),
            on_timeout=data.get("on_timeout", "kill"),
            auto_resume="auto_resume" in data,
            preview_auth="preview_auth" in data,
            env=unix_lines(data.get("env", "")),
            allow_domains=data.get("allow_domains", "").strip(),
            volume=data.get("volume", "").strip(),
        )

    def spec(self) -> SandboxSpec:
        """The validated request. Raises ``InvalidInput`` with a sentence per field."""
        self.reject_unusable()
        return parse_spec(
            SandboxSpec,
            {
                **self.origin(),
                "network": self.network,
                "timeout_seconds": parse_number(self.timeout_seconds),
                "on_timeout": self.on_timeout,
                "auto_resume": self.auto_resume,
                "preview_auth": self.preview_auth,
                "env": parse_environment(self.env),
                "allow_domains": self.allowlist(),
                "volume": self.volume or None,
            },
        )

    def origin(self) -> dict[str, str]:
        """What it starts from, as fields of the request. Raises ``InvalidInput``."""
        if not self.template:
            sentence = "Choose what to start from."
            raise InvalidInput(sentence, fields={"template": sentence})
        return {"template": self.template, "size": self.size}

    def allowlist(self) -> list[str] | None:
        """The allowlist that the typed names stand for; None on other networks."""
        return extend_default(self.allow_domains) if self.network == "restricted" else None

    def add_error(self, error: DomainError) -> None:
        """As any form does, but show what is wrong with image or volume where it is chosen."""
        super().add_error(error)
        if isinstance(error, (NotFound, Conflict)):
            of_volume = error.fields or error.code.startswith("volume_")
            self.errors = {"volume" if of_volume else self.origin_field: error.detail}


@dataclass
class ForkForm(SandboxForm):
    """The form on a snapshot's page. Size and image are the snapshot's."""

    snapshot: str = ""
    origin_field: ClassVar[str] = FORM_ERROR

    def origin(self) -> dict[str, str]:
        """The snapshot."""
        return {"snapshot": self.snapshot}


@dataclass
class SnapshotForm(Form):
    """The form for a snapshot of a sandbox."""

    name: str = ""

    labels: ClassVar[Mapping[str, str]] = {"name": "The name"}

    @classmethod
    def from_post(cls, data: QueryDict) -> SnapshotForm:
        """A form from posted data."""
        return cls(name=data.get("name", "").strip())

    def spec(self) -> SnapshotSpec:
        """The validated request. Raises ``InvalidInput``."""
        self.reject_unusable()
        return parse_spec(SnapshotSpec, {"name": self.name or None})


@dataclass
class CommandForm(Form):
    """A sandbox's command form."""

    command: str = ""
    cwd: str = "/workspace"
    timeout_seconds: str = COMMAND_SECONDS
    # Nobody waits for it then, and it has no time limit.
    background: bool = False

    labels: ClassVar[Mapping[str, str]] = {
        "command": "The command",
        "cwd": "The directory",
        "timeout_seconds": "The time limit",
    }

    @classmethod
    def from_post(cls, data: QueryDict) -> CommandForm:
        """A form from posted data. Browsers end lines with CR LF."""
        return cls(
            command=unix_lines(data.get("command", "")),
            cwd=data.get("cwd", "").strip() or "/workspace",
            timeout_seconds=data.get("timeout_seconds", "").strip() or COMMAND_SECONDS,
            background="background" in data,
        )

    def spec(self) -> ExecSpec:
        """The validated request. Raises ``InvalidInput``."""
        self.reject_unusable()
        return parse_spec(
            ExecSpec,
            {
                "command": self.command,
                "cwd": self.cwd,
                "timeout_seconds": parse_number(self.timeout_seconds),
            },
        )

    def background_spec(self) -> BackgroundSpec:
        """The validated request for a command that nobody waits for. Raises ``InvalidInput``."""
        self.reject_unusable()
        return parse_spec(BackgroundSpec, {"command": self.command, "cwd": self.cwd})


def parse_number(text: str) -> int | str:
    """The number in a field. Other text stays, for the spec to refuse."""
    return int(text) if text.isascii() and text.isdigit() and len(text) < 10 else text

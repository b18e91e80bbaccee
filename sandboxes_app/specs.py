"""What a caller may ask of sandboxes: strict models for console, REST and MCP alike."""

from __future__ import annotations

import base64
import binascii
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from orkestr_console.core.allowlist import Allowlist
from orkestr_console.core.environment import Environment
from orkestr_console.core.script import usable_script
from orkestr_console.core.text import JOINERS, place, readable

LARGEST_METADATA = 16 * 1024
LARGEST_FILE = 16 * 1024 * 1024
LONGEST_PATH = 4096
LONGEST_NAME = 100
MOST_FILES = 64
MOST_PAIRS = 64
SHORTEST_LIFE = 10
LONGEST_EXEC = 3600

Size = Literal["small", "medium", "large"]
Network = Literal["off", "restricted", "open"]
SIZES: dict[str, tuple[float, int]] = {
    "small": (1.0, 1024),
    "medium": (2.0, 4096),
    "large": (4.0, 8192),
}


def usable_metadata(metadata: dict[str, str]) -> dict[str, str]:
    """Labels small enough to be kept with the sandbox."""
    if len(metadata) > MOST_PAIRS:
        raise ValueError(f"has {len(metadata)} entries; at most {MOST_PAIRS} are kept.")
    if any(not key for key in metadata):
        raise ValueError("has an entry with a blank name.")
    if sum(len(k.encode()) + len(v.encode()) for k, v in metadata.items()) > LARGEST_METADATA:
        raise ValueError(f"is larger than {LARGEST_METADATA:,} bytes altogether.")
    return metadata


def usable_path(path: str) -> str:
    """An absolute path."""
    if not path.startswith("/"):
        raise ValueError("must be an absolute path, such as '/workspace/main.py'.")
    if (at := path.find("\0")) >= 0:
        raise ValueError(f"must not contain NUL characters; take out \\0, {place(path, at)}.")
    if len(path.encode()) > LONGEST_PATH:
        raise ValueError(f"is longer than {LONGEST_PATH:,} bytes.")
    return path


Path = Annotated[
    str,
    AfterValidator(usable_path),
    Field(description="An absolute path, such as '/workspace/main.py'."),
]


class Spec(BaseModel):
    """The root of the specs: nothing is converted, nothing unknown is taken."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


def network_off() -> Network:
    """The network of a sandbox that names none."""
    return "off"


class SandboxSpec(Spec):
    """A sandbox to be created. What later releases add is taken with its default only.

    With a snapshot the size is the snapshot's, and so are the network and its list of hosts where
    the caller names none.
    """

    template: str | None = Field(
        default=None, description="A ready template's id, or a base's name."
    )
    snapshot: str | None = Field(
        default=None,
        description="Instead of template: a ready snapshot's id. It determines the size.",
    )
    size: Size = Field(default="small", description="1 vCPU and 1 GB, 2 and 4 GB, or 4 and 8 GB.")
    network: Network = Field(
        # A factory, because JSON schemas leave its value out: with a snapshot it is another.
        default_factory=network_off,
        description="off; restricted: package registries and the default list; open. By default "
        "off, or the snapshot's.",
    )
    timeout_seconds: int = Field(
        default=600, ge=SHORTEST_LIFE, description="Seconds until it expires."
    )
    on_timeout: Literal["kill", "pause"] = "kill"
    auto_resume: bool = False
    preview_auth: bool = False
    env: Environment = Field(
        default_factory=dict, description="Environment variables for its commands."
    )
    metadata: Annotated[dict[str, str], AfterValidator(usable_metadata)] = Field(
        default_factory=dict, description="Labels to find it by."
    )
    region: str | None = None
    allow_domains: Allowlist = Field(
        default=None, description="Hosts instead of the default list, for network restricted."
    )
    volume: str | None = None

    @model_validator(mode="after")
    def one_source(self) -> Self:
        """Exactly one of a template and a snapshot is what it boots from."""
        if bool(self.template) == bool(self.snapshot):
            raise ValueError("Provide exactly one of 'template' or 'snapshot'.")
        return self


def usable_label(name: str) -> str:
    """A name a person can read, or none."""
    if len(name := name.strip().strip(JOINERS)) > LONGEST_NAME:
        raise ValueError(f"must have at most {LONGEST_NAME} characters; this has {len(name)}.")
    return readable(name)


class SnapshotSpec(Spec):
    """A snapshot to be taken, and what to call it."""

    name: Annotated[str, AfterValidator(usable_label)] | None = Field(
        default=None, description="What to call it."
    )


class ExecSpec(Spec):
    """A command to be run; ``timeout_seconds`` ends its whole process tree."""

    command: Annotated[str, AfterValidator(usable_script)] = Field(description="A shell command.")
    cwd: Path = Field(default="/workspace", description="Where it runs.")
    env: Environment = Field(default_factory=dict, description="Additional environment variables.")
    timeout_seconds: int = Field(
        default=60, ge=1, le=LONGEST_EXEC, description="Seconds after which it is stopped."
    )
    stream: bool = False


class TimeoutSpec(Spec):
    """A new lifetime, from now, in seconds."""

    timeout_seconds: int = Field(ge=SHORTEST_LIFE, description="Seconds from now until it expires.")


class FileSpec(Spec):
    """A file to be written; ``content`` is base64 (RFC 4648)."""

    path: Path
    content: str
    mode: int = Field(default=0o644, ge=0, le=0o7777)

    def decoded(self) -> bytes:
        """The bytes. Raises ``ValueError`` unless ``content`` is base64."""
        try:
            return base64.b64decode(self.content, validate=True)
        except binascii.Error:
            raise ValueError("must be base64.") from None


class BadRow(Spec):
    """A row of a batch that is no file to be written."""

    path: str


def row_of_batch(given: Any) -> Any:
    """A row by itself: what is wrong with one must not spoil the others."""
    if not isinstance(given, dict):
        return given
    try:
        return FileSpec.model_validate(given)
    except ValidationError:
        path = given.get("path")
        return BadRow(path=path if isinstance(path, str) else "")


class BatchSpec(Spec):
    """Files to be written in one call; each fails or not by itself."""

    files: list[Annotated[FileSpec | BadRow, BeforeValidator(row_of_batch)]] = Field(
        min_length=1, max_length=MOST_FILES
    )


class DirectorySpec(Spec):
    """A directory to be made."""

    path: Path
    parents: bool = True


class MoveSpec(Spec):
    """A file or directory to be renamed."""

    source: Path
    destination: Path

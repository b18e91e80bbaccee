"""The request models for sandboxes: strict, and shared by console, REST and MCP."""

from __future__ import annotations

import base64
import binascii
import re
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    ValidationError,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import core_schema

from hostruntime.wire.interpreter import MAX_CODE_CHARACTERS
from hostruntime.wire.volumes import MAX_SIZE_MB
from orkestr_console.core.allowlist import Allowlist
from orkestr_console.core.environment import Environment
from orkestr_console.core.ids import is_id
from orkestr_console.core.script import usable_script
from orkestr_console.core.text import JOINERS, position_text, readable

MAX_METADATA_BYTES = 16 * 1024
MAX_FILE_BYTES = 16 * 1024 * 1024
MAX_PATH_BYTES = 4096
MAX_EDIT_BYTES = 1024 * 1024
MAX_NAME_LENGTH = 100
MAX_FILES = 64
MAX_METADATA_ENTRIES = 64
MIN_TIMEOUT_SECONDS = 10
# Of a volume that is created by its first use.
DEFAULT_SIZE_MB = 10_240
VOLUME_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", re.ASCII)
MAX_EXEC_SECONDS = 3600

# What else languages are called.
LANGUAGES = {
    "py": "python",
    "python3": "python",
    "js": "javascript",
    "node": "javascript",
    "nodejs": "javascript",
    "ts": "typescript",
}

Size = Literal["small", "medium", "large"]
Network = Literal["off", "restricted", "open"]
SIZES: dict[str, tuple[float, int]] = {
    "small": (1.0, 1024),
    "medium": (2.0, 4096),
    "large": (4.0, 8192),
}


def usable_metadata(metadata: dict[str, str]) -> dict[str, str]:
    """Labels small enough to be stored with the sandbox."""
    if len(metadata) > MAX_METADATA_ENTRIES:
        raise ValueError(f"has {len(metadata)} entries; at most {MAX_METADATA_ENTRIES} are kept.")
    if any(not key for key in metadata):
        raise ValueError("has an entry with a blank name.")
    if sum(len(k.encode()) + len(v.encode()) for k, v in metadata.items()) > MAX_METADATA_BYTES:
        raise ValueError(f"is larger than {MAX_METADATA_BYTES:,} bytes altogether.")
    return metadata


def usable_path(path: str) -> str:
    """An absolute path."""
    if not path.startswith("/"):
        raise ValueError("must be an absolute path, such as '/workspace/main.py'.")
    if (at := path.find("\0")) >= 0:
        raise ValueError(
            f"must not contain NUL characters; take out \\0, {position_text(path, at)}."
        )
    if len(path.encode()) > MAX_PATH_BYTES:
        raise ValueError(f"is longer than {MAX_PATH_BYTES:,} bytes.")
    return path


def usable_volume_name(name: str) -> str:
    """A name of a volume, or an id."""
    if VOLUME_NAME.fullmatch(name) is None:
        raise ValueError(
            "must be 1 to 63 letters, digits, '.', '_' and '-', and start with a letter or digit."
        )
    return name


def new_volume_name(name: str) -> str:
    """A name that is no id."""
    if usable_volume_name(name).startswith("vol_"):
        raise ValueError("must not start with 'vol_', as ids do.")
    return name


def usable_reference(name: str) -> str:
    """The name of a volume that there may not be yet, or the id of one."""
    return name if is_id("vol", name) else new_volume_name(name)


VolumeReference = Annotated[str, AfterValidator(usable_reference)]
Days = Annotated[int, Field(ge=1, le=3650)]
Hours = Annotated[int, Field(ge=1, le=24)]
Path = Annotated[
    str,
    AfterValidator(usable_path),
    Field(
        description="An absolute path, such as '/workspace/main.py'.",
        json_schema_extra={"pattern": "^/"},
    ),
]


class Spec(BaseModel):
    """The base of the specs: nothing is coerced, and unknown fields are refused."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


def network_off() -> Network:
    """The network of a sandbox that names none."""
    return "off"


def only(one: str, other: str) -> dict[str, Any]:
    """The schema of a body that has the first of two fields, and not the second."""
    blank = {"enum": [None, ""]}
    given = {"type": "string", "minLength": 1}
    return {"required": [one], "properties": {one: given, other: blank}}


class SandboxSpec(Spec):
    """A sandbox to create. What this release lacks is accepted with its default only.

    With a snapshot, the size is the snapshot's, and so are the network and its allowlist unless the
    caller sets them.
    """

    model_config = ConfigDict(
        json_schema_extra={"oneOf": [only("template", "snapshot"), only("snapshot", "template")]}
    )

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
        default=600, ge=MIN_TIMEOUT_SECONDS, description="Seconds until it expires."
    )
    on_timeout: Literal["kill", "pause"] = Field(
        default="kill", description="What happens when it expires."
    )
    auto_resume: bool = Field(
        default=False, description="Whether a command or file call resumes it while it is paused."
    )
    preview_auth: bool = Field(
        default=False, description="Whether its previews need preview_auth_token."
    )
    env: Environment = Field(
        default_factory=dict, description="Environment variables for its commands."
    )
    metadata: Annotated[dict[str, str], AfterValidator(usable_metadata)] = Field(
        default_factory=dict,
        description="Labels to find it by.",
        json_schema_extra={
            "maxProperties": MAX_METADATA_ENTRIES,
            "propertyNames": {"minLength": 1},
        },
    )
    region: str | None = None
    allow_domains: Allowlist = Field(
        default=None, description="Hosts instead of the default list, for network restricted."
    )
    volume: VolumeReference | None = Field(
        default=None,
        description="A volume's name or id, mounted at /persist; created if there is none.",
    )

    @model_validator(mode="after")
    def one_source(self) -> Self:
        """Require exactly one of a template and a snapshot to boot from."""
        if bool(self.template) == bool(self.snapshot):
            raise ValueError("Provide exactly one of 'template' or 'snapshot'.")
        return self

    @model_validator(mode="after")
    def allowlist_needs_restricted(self) -> Self:
        """Refuse an allowlist on any network but ``restricted``, which a snapshot can have."""
        named = self.snapshot is None or "network" in self.model_fields_set
        if self.allow_domains is not None and named and self.network != "restricted":
            raise ValueError("'allow_domains' applies to network 'restricted' only.")
        return self


class VolumeSpec(Spec):
    """A volume to create; without a lifetime it stays until it is deleted."""

    name: Annotated[str, AfterValidator(new_volume_name)]
    size_gb: float = Field(default=10, ge=0.25, le=MAX_SIZE_MB / 1024, allow_inf_nan=False)
    region: str | None = None
    max_lifetime_days: Days | None = None
    max_lifetime_hours: Hours | None = None

    @property
    def size_mb(self) -> int:
        """The size in MiB, which 1 GB has 1,024 of here."""
        return round(self.size_gb * 1024)

    @model_validator(mode="after")
    def one_lifetime(self) -> Self:
        """Refuse a lifetime in both units."""
        if self.max_lifetime_days is not None and self.max_lifetime_hours is not None:
            raise ValueError("Provide max_lifetime_days or max_lifetime_hours, not both.")
        return self


class LifetimeSpec(Spec):
    """A volume's new lifetime, counted from its creation; null is for ever."""

    max_lifetime_days: Days | None = None
    max_lifetime_hours: Hours | None = None

    @model_validator(mode="after")
    def one_unit(self) -> Self:
        """Require exactly one of the units, as the other is cleared."""
        if len(self.model_fields_set) != 1:
            raise ValueError("Provide exactly one of max_lifetime_days and max_lifetime_hours.")
        return self


class RegionSpec(Spec):
    """Where to move a volume."""

    region: str


def usable_label(name: str) -> str:
    """A readable name, or a blank."""
    if len(name := name.strip().strip(JOINERS)) > MAX_NAME_LENGTH:
        raise ValueError(f"must have at most {MAX_NAME_LENGTH} characters; this has {len(name)}.")
    return readable(name)


class SnapshotSpec(Spec):
    """A snapshot to create, and its name."""

    name: Annotated[str, AfterValidator(usable_label)] | None = Field(
        default=None, description="What to call it."
    )


class BackgroundSpec(Spec):
    """A command that nobody waits for: it runs until it ends, is killed, or its sandbox ends."""

    command: Annotated[str, AfterValidator(usable_script)] = Field(description="A shell command.")
    cwd: Path = Field(default="/workspace", description="Where it runs.")
    env: Environment = Field(default_factory=dict, description="Additional environment variables.")


class ExecSpec(BackgroundSpec):
    """A command to run; its whole process tree is killed after ``timeout_seconds``."""

    timeout_seconds: int = Field(
        default=60, ge=1, le=MAX_EXEC_SECONDS, description="Seconds after which it is stopped."
    )
    stream: bool = Field(default=False, description="Whether to answer with events while it runs.")


def spoken_language(language: str) -> str:
    """A language as kernels name it."""
    language = language.lower()
    return LANGUAGES.get(language, language)


Language = Annotated[
    str,
    Field(
        max_length=32,
        pattern=r"^[A-Za-z][A-Za-z0-9+#._-]*$",
        description="A language that the image has a Jupyter kernel for.",
    ),
    AfterValidator(spoken_language),
]


class ContextSpec(Spec):
    """A context to create: a kernel of its own."""

    language: Language = "python"
    cwd: Path = Field(default="/workspace", description="Where its kernel starts.")


class CodeSpec(Spec):
    """Code to run in a kernel, which keeps its variables; interrupted after ``timeout_seconds``."""

    code: str = Field(max_length=MAX_CODE_CHARACTERS, description="The code.")
    language: Language = "python"
    context_id: str | None = Field(
        default=None,
        max_length=64,
        description="A context, which has its own language; by default the language's own one.",
    )
    timeout_seconds: int = Field(
        default=60, ge=1, le=MAX_EXEC_SECONDS, description="Seconds until it is interrupted."
    )
    stream: bool = False


class TimeoutSpec(Spec):
    """A new lifetime, from now, in seconds."""

    timeout_seconds: int = Field(
        ge=MIN_TIMEOUT_SECONDS, description="Seconds from now until it expires."
    )


class FileSpec(Spec):
    """A file to write; ``content`` is base64 (RFC 4648)."""

    path: Path
    content: str = Field(
        description="Its bytes, in base64.", json_schema_extra={"contentEncoding": "base64"}
    )
    mode: int = Field(
        default=0o644, ge=0, le=0o7777, description="Its permissions, as a number: 420 is 0644."
    )

    def decoded(self) -> bytes:
        """The bytes. Raises ``ValueError`` unless ``content`` is base64."""
        try:
            return base64.b64decode(self.content, validate=True)
        except binascii.Error:
            raise ValueError("must be base64.") from None


class InvalidRow(Spec):
    """A row of a batch that is not a valid ``FileSpec``."""

    path: str


def parse_row(value: Any) -> Any:
    """Validate a row on its own: one invalid row must not fail the others."""
    if not isinstance(value, dict):
        return value
    try:
        return FileSpec.model_validate(value)
    except ValidationError:
        path = value.get("path")
        return InvalidRow(path=path if isinstance(path, str) else "")


class AsFile:
    """Annotates a row of a batch, whose schema is that of a valid one."""

    def __get_pydantic_json_schema__(
        self, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        """The schema of a file."""
        return handler(FileSpec.__pydantic_core_schema__)


class BatchSpec(Spec):
    """Files to write in one call; each succeeds or fails on its own."""

    files: list[Annotated[FileSpec | InvalidRow, BeforeValidator(parse_row), AsFile()]] = Field(
        min_length=1, max_length=MAX_FILES
    )


def short_text(text: str) -> str:
    """Text of an edit, which can be sent to the host."""
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        raise ValueError("has half of a surrogate pair, which no file can have.") from None
    if size > MAX_EDIT_BYTES:
        raise ValueError(f"is larger than {MAX_EDIT_BYTES:,} bytes; write the file anew instead.")
    return text


EditText = Annotated[str, AfterValidator(short_text)]


class EditSpec(Spec):
    """Text to replace in a file."""

    path: Path
    old: EditText = Field(min_length=1, description="Exact text to replace.")
    new: EditText
    count: int = Field(default=1, ge=1, description="How often old occurs; else refused.")
    replace_all: bool = Field(default=False, description="However often it does.")


class DirectorySpec(Spec):
    """A directory to create."""

    path: Path
    parents: bool = Field(default=True, description="Whether to create those above it as well.")


class PresignSpec(Spec):
    """A file to send or fetch without a token, and for how many seconds that is possible."""

    path: Path
    expires_in: int = Field(
        default=600, ge=60, le=3600, description="For how many seconds the address is valid."
    )


class MoveSpec(Spec):
    """A file or directory to rename."""

    source: Path
    destination: Path

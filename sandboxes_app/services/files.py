"""Files of a running sandbox."""

from __future__ import annotations

import posixpath
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from hostruntime import errors as host_errors
from hostruntime.wire.files import DirectoryListing, FileContent, FileStat
from orkestr_console.accounts.actor import READ, WRITE, Actor
from orkestr_console.accounts.audit import audited
from orkestr_console.core.errors import (
    Conflict,
    DomainError,
    InvalidInput,
    NotFound,
    PayloadTooLarge,
)
from orkestr_console.core.hosts import host, translate_error
from sandboxes_app.models import Sandbox
from sandboxes_app.services.lifecycle import find_running, settle_if_missing
from sandboxes_app.specs import (
    MAX_FILE_BYTES,
    BatchSpec,
    DirectorySpec,
    FileSpec,
    InvalidRow,
    MoveSpec,
    usable_path,
)

WRITABLE = ("/workspace", "/tmp")


@dataclass(frozen=True)
class BatchRow:
    """The result of one file of a batch: the bytes written, or an error code."""

    path: str
    bytes_written: int | None
    error: str | None


def read_path(actor: Actor, sandbox_id: str, path: str | None) -> FileContent | DirectoryListing:
    """A complete file, or a directory's entries.

    Raises ``NotFound``, ``Conflict`` (neither file nor directory), ``PayloadTooLarge`` (16 MiB).
    """
    actor.require(READ)
    checked = required_path(path)
    with running_sandbox(actor, sandbox_id) as sandbox:
        return host().read_path(sandbox.pk, checked, max_bytes=MAX_FILE_BYTES)


def stat(actor: Actor, sandbox_id: str, path: str | None) -> FileStat:
    """What is at a path; a missing one is not an error."""
    actor.require(READ)
    checked = required_path(path)
    with running_sandbox(actor, sandbox_id) as sandbox:
        return host().stat(sandbox.pk, checked)


@audited("file.write", "sandbox", note=lambda size, spec: {"path": spec.path, "bytes": size})
def write_file(actor: Actor, sandbox_id: str, spec: FileSpec) -> int:
    """Write a complete file or nothing; the number of bytes written.

    Raises ``InvalidInput`` (not base64, or outside the writable roots), ``PayloadTooLarge``.
    """
    actor.require(WRITE)
    with running_sandbox(actor, sandbox_id) as sandbox:
        return write(sandbox, spec)


def write(sandbox: Sandbox, spec: FileSpec) -> int:
    """Write one file. Raises domain errors for the request, host errors for the rest."""
    path = writable_path(spec.path)
    try:
        content = spec.decoded()
    except ValueError as error:
        raise InvalidInput(f"content: {error}", fields={"content": str(error)}) from None
    if len(content) > MAX_FILE_BYTES:
        raise PayloadTooLarge(MAX_FILE_BYTES)
    return host().write_file(sandbox.pk, path, content, mode=spec.mode)


@audited("file.write", "sandbox", note=lambda rows, _: {"files": len(rows)})
def write_batch(actor: Actor, sandbox_id: str, spec: BatchSpec) -> list[BatchRow]:
    """Write many files; a failure is a row of the result, and doesn't stop the rest."""
    actor.require(WRITE)
    with running_sandbox(actor, sandbox_id) as sandbox:
        return [write_row(sandbox, file) for file in spec.files]


def write_row(sandbox: Sandbox, spec: FileSpec | InvalidRow) -> BatchRow:
    """Write one file of a batch. Only a missing sandbox ends the batch."""
    if isinstance(spec, InvalidRow):
        return BatchRow(spec.path, None, InvalidInput.default_code)
    try:
        return BatchRow(spec.path, write(sandbox, spec), None)
    except host_errors.ContainerGone:
        raise
    except host_errors.HostError as error:
        return BatchRow(spec.path, None, translate_error(error).code)
    except DomainError as error:
        return BatchRow(spec.path, None, error.code)


@audited("file.delete", "sandbox", note=lambda _, path: {"path": path})
def delete_path(actor: Actor, sandbox_id: str, path: str | None) -> None:
    """Delete a file. Raises ``NotFound``, and ``Conflict`` for a directory."""
    actor.require(WRITE)
    target = writable_path(required_path(path))
    with running_sandbox(actor, sandbox_id) as sandbox:
        if host().stat(sandbox.pk, target).is_dir:
            raise Conflict(
                f"{target} is a directory; only files can be deleted here. Run 'rm -r' in the "
                "sandbox if you mean it.",
                code="is_a_directory",
            )
        host().delete_path(sandbox.pk, target)


@audited("file.mkdir", "sandbox", note=lambda _, spec: {"path": spec.path})
def mkdir(actor: Actor, sandbox_id: str, spec: DirectorySpec) -> None:
    """Create a directory."""
    actor.require(WRITE)
    target = writable_path(spec.path)
    with running_sandbox(actor, sandbox_id) as sandbox:
        host().mkdir(sandbox.pk, target, parents=spec.parents)


@audited("file.move", "sandbox", note=lambda _, spec: {"path": spec.source, "to": spec.destination})
def move(actor: Actor, sandbox_id: str, spec: MoveSpec) -> None:
    """Rename a file or directory."""
    actor.require(WRITE)
    source, destination = writable_path(spec.source), writable_path(spec.destination)
    with running_sandbox(actor, sandbox_id) as sandbox:
        host().move(sandbox.pk, source, destination)


@contextmanager
def running_sandbox(actor: Actor, sandbox_id: str) -> Iterator[Sandbox]:
    """A running sandbox; translates the host's errors about its files into domain errors."""
    sandbox = find_running(actor, sandbox_id)
    try:
        yield sandbox
    except host_errors.ContainerGone as error:
        settle_if_missing(sandbox)
        raise translate_error(error) from error
    except host_errors.NotFound as error:
        # Either the path, or the container itself.
        if settle_if_missing(sandbox):
            raise translate_error(host_errors.ContainerGone(error.detail)) from error
        raise NotFound(error.detail, code="file_not_found") from error
    except host_errors.FileTooLarge as error:
        raise PayloadTooLarge(MAX_FILE_BYTES, error.detail) from error
    except host_errors.HostError as error:
        raise translate_error(error) from error


def required_path(path: str | None) -> str:
    """The ``path`` of a query string. Raises ``InvalidInput``."""
    try:
        return usable_path(path or "")
    except ValueError as error:
        raise InvalidInput(f"path: {error}", fields={"path": str(error)}) from None


def writable_path(path: str) -> str:
    """The normalized path, if it is below a writable root. Raises ``InvalidInput``.

    Only the path's text is checked: a link inside can only lead into the same container.
    """
    normalized = "/" + posixpath.normpath(path).lstrip("/")
    if not normalized.startswith(tuple(f"{root}/" for root in WRITABLE)):
        roots = " and ".join(WRITABLE)
        raise InvalidInput(
            f"{path} is not below {roots}, which are what this call may change. Use a command "
            "for other places.",
            code="not_permitted",
        )
    return normalized

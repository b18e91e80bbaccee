"""Files of a running sandbox."""

from __future__ import annotations

import posixpath
from collections.abc import Callable
from dataclasses import dataclass

from hostruntime import errors as host_errors
from hostruntime.client.host_client import HostClient
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
from orkestr_console.core.hosts import Steps, ask, in_steps, translate_error
from sandboxes_app.models import Sandbox
from sandboxes_app.services.lifecycle import settle_if_missing
from sandboxes_app.services.waking import find_awake, translate_paused
from sandboxes_app.specs import (
    MAX_FILE_BYTES,
    BatchSpec,
    DirectorySpec,
    FileSpec,
    InvalidRow,
    MoveSpec,
    usable_path,
)

# Where a volume is.
PERSIST = "/persist"
WRITABLE = ("/workspace", "/tmp")


@dataclass(frozen=True)
class BatchRow:
    """The result of one file of a batch: the bytes written, or an error's code and sentence."""

    path: str
    bytes_written: int | None
    error: str | None
    detail: str = ""


@in_steps
def read_path(
    actor: Actor, sandbox_id: str, path: str | None
) -> Steps[FileContent | DirectoryListing]:
    """A complete file, or a directory's entries.

    Raises ``NotFound``, ``Conflict`` (neither file nor directory), ``PayloadTooLarge`` (16 MiB).
    """
    actor.require(READ)
    checked = required_path(path)

    def read(sandbox: Sandbox) -> Steps[FileContent | DirectoryListing]:
        return ask(HostClient.read_path, sandbox.pk, checked, max_bytes=MAX_FILE_BYTES)

    return (yield from in_running(actor, sandbox_id, read))


@in_steps
def stat(actor: Actor, sandbox_id: str, path: str | None) -> Steps[FileStat]:
    """What is at a path; a missing one is not an error."""
    actor.require(READ)
    checked = required_path(path)
    return (
        yield from in_running(
            actor, sandbox_id, lambda sandbox: ask(HostClient.stat, sandbox.pk, checked)
        )
    )


@in_steps
@audited("file.write", "sandbox", note=lambda size, spec: {"path": spec.path, "bytes": size})
def write_file(actor: Actor, sandbox_id: str, spec: FileSpec) -> Steps[int]:
    """Write a complete file or nothing; the number of bytes written.

    Raises ``InvalidInput`` (not base64, or outside the writable roots), ``PayloadTooLarge``.
    """
    actor.require(WRITE)
    return (yield from in_running(actor, sandbox_id, lambda sandbox: write(sandbox, spec)))


def write(sandbox: Sandbox, spec: FileSpec) -> Steps[int]:
    """Write one file. Raises domain errors for the request, host errors for the rest."""
    path = on_volume(sandbox, writable_path(spec.path))
    try:
        content = spec.decoded()
    except ValueError as error:
        raise InvalidInput(f"content: {error}", fields={"content": str(error)}) from None
    if len(content) > MAX_FILE_BYTES:
        raise PayloadTooLarge(MAX_FILE_BYTES)
    write_file = HostClient.write_file
    return (yield from ask(write_file, sandbox.pk, path, content, mode=spec.mode))


@in_steps
@audited("file.write", "sandbox", note=lambda rows, _: {"files": len(rows)})
def write_batch(actor: Actor, sandbox_id: str, spec: BatchSpec) -> Steps[list[BatchRow]]:
    """Write many files; a failure is a row of the result, and doesn't stop the rest."""
    actor.require(WRITE)
    return (yield from in_running(actor, sandbox_id, lambda sandbox: write_rows(sandbox, spec)))


def write_rows(sandbox: Sandbox, spec: BatchSpec) -> Steps[list[BatchRow]]:
    """Write a batch's files in their order."""
    rows = []
    for file in spec.files:
        rows.append((yield from write_row(sandbox, file)))
    return rows


def write_row(sandbox: Sandbox, spec: FileSpec | InvalidRow) -> Steps[BatchRow]:
    """Write one file of a batch. Only a missing sandbox ends the batch."""
    if isinstance(spec, InvalidRow):
        return BatchRow(spec.path, None, InvalidInput.default_code, "It is not valid.")
    try:
        return BatchRow(spec.path, (yield from write(sandbox, spec)), None)
    except host_errors.ContainerGone:
        raise
    except host_errors.HostError as error:
        return BatchRow(spec.path, None, translate_error(error).code, error.detail)
    except DomainError as error:
        return BatchRow(spec.path, None, error.code, error.detail)


@in_steps
@audited("file.delete", "sandbox", note=lambda _, path: {"path": path})
def delete_path(actor: Actor, sandbox_id: str, path: str | None) -> Steps[None]:
    """Delete a file. Raises ``NotFound``, and ``Conflict`` for a directory."""
    actor.require(WRITE)
    target = writable_path(required_path(path))
    yield from in_running(actor, sandbox_id, lambda sandbox: delete_file(sandbox, target))


def delete_file(sandbox: Sandbox, target: str) -> Steps[None]:
    """Delete what is at a path unless that is a directory."""
    on_volume(sandbox, target)
    if (yield from ask(HostClient.stat, sandbox.pk, target)).is_dir:
        raise Conflict(
            f"{target} is a directory; only files can be deleted here. Run 'rm -r' in the "
            "sandbox if you mean it.",
            code="is_a_directory",
        )
    yield from ask(HostClient.delete_path, sandbox.pk, target)


@in_steps
@audited("file.mkdir", "sandbox", note=lambda _, spec: {"path": spec.path})
def mkdir(actor: Actor, sandbox_id: str, spec: DirectorySpec) -> Steps[None]:
    """Create a directory."""
    actor.require(WRITE)
    target = writable_path(spec.path)

    def make(sandbox: Sandbox) -> Steps[None]:
        path = on_volume(sandbox, target)
        return ask(HostClient.mkdir, sandbox.pk, path, parents=spec.parents)

    yield from in_running(actor, sandbox_id, make)


@in_steps
@audited("file.move", "sandbox", note=lambda _, spec: {"path": spec.source, "to": spec.destination})
def move(actor: Actor, sandbox_id: str, spec: MoveSpec) -> Steps[None]:
    """Rename a file or directory."""
    actor.require(WRITE)
    source, destination = writable_path(spec.source), writable_path(spec.destination)

    def rename(sandbox: Sandbox) -> Steps[None]:
        paths = on_volume(sandbox, source), on_volume(sandbox, destination)
        return ask(HostClient.move, sandbox.pk, *paths)

    yield from in_running(actor, sandbox_id, rename)


def in_running[R](actor: Actor, sandbox_id: str, work: Callable[[Sandbox], Steps[R]]) -> Steps[R]:
    """Do something in a running sandbox; the host's errors are about its files."""
    sandbox = yield from find_awake.steps(actor, sandbox_id)
    try:
        return (yield from work(sandbox))
    except host_errors.HostError as error:
        if (paused := translate_paused(actor, sandbox, error)) is not None:
            raise paused from error
        raise (yield from file_error.steps(sandbox, error)) from error


@in_steps
def file_error(sandbox: Sandbox, error: host_errors.HostError) -> Steps[DomainError]:
    """The domain error for the host's about a file; corrects the row if the sandbox is gone."""
    match error:
        case host_errors.ContainerGone():
            yield from settle_if_missing.steps(sandbox)
        case host_errors.NotFound() | host_errors.Exhausted():
            # Either the path, or what served it, or the container itself.
            if (yield from has_ended(sandbox)):
                return translate_error(host_errors.ContainerGone(error.detail))
            if isinstance(error, host_errors.NotFound):
                return NotFound(error.detail, code="file_not_found")
        case host_errors.FileTooLarge():
            return PayloadTooLarge(MAX_FILE_BYTES, error.detail)
    return translate_error(error)


def has_ended(sandbox: Sandbox) -> Steps[bool]:
    """Whether the sandbox is gone, or about to be; corrects its row."""
    live = Sandbox.objects.live().filter(pk=sandbox.pk).exists()
    return (yield from settle_if_missing.steps(sandbox)) or not live


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
    if not normalized.startswith(tuple(f"{root}/" for root in (*WRITABLE, PERSIST))):
        roots = " and ".join(WRITABLE)
        raise InvalidInput(
            f"{path} is not below {roots}, which are what this call may change. Use a command "
            "for other places.",
            code="not_permitted",
        )
    return normalized


def on_volume(sandbox: Sandbox, path: str) -> str:
    """The path, unless nobody would find it on a volume although it looks so.

    Raises ``InvalidInput``.
    """
    if path.startswith(f"{PERSIST}/") and not sandbox.volume_name:
        raise InvalidInput(
            f"This sandbox has no volume, so what is below {PERSIST} would be gone with it. Create "
            "a sandbox with a volume, or write elsewhere.",
            code="not_permitted",
        )
    return path

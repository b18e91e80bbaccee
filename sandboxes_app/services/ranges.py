"""Parts of files of any size, and editing files in place."""

from __future__ import annotations

from dataclasses import dataclass

from hostruntime import errors as host_errors
from hostruntime.client.host_client import HostClient
from hostruntime.wire.files import EditedFile, EditFile, FilePart, WantedPart
from orkestr_console.accounts.actor import READ, WRITE, Actor
from orkestr_console.accounts.audit import audited
from orkestr_console.core.hosts import Steps, ask, async_host, in_steps
from orkestr_console.http.threads import in_thread
from sandboxes_app.models import Sandbox
from sandboxes_app.services.files import file_error, in_running, required_path, writable_path
from sandboxes_app.services.waking import find_awake, translate_paused
from sandboxes_app.specs import EditSpec

# The most of a file that one call holds in memory.
MAX_RANGE_BYTES = 8 * 1024 * 1024


@dataclass(frozen=True)
class FileRange:
    """Some bytes of a file: which ones, and the size of all of it."""

    path: str
    size: int
    offset: int
    content: bytes


async def read_range(actor: Actor, sandbox_id: str, path: str, wanted: WantedPart) -> FileRange:
    """A part of a file, of at most ``wanted.most`` bytes: no more is sent, however large it is.

    On the event loop. Raises ``NotFound``, ``Conflict`` (not running, not a file),
    ``RangeNotSatisfiable``, ``RateLimited``.
    """
    most = wanted.most
    if most is None or most > MAX_RANGE_BYTES:
        raise ValueError("a range has a limit")
    checked = required_path(path)
    sandbox = await in_thread(find_readable, actor, sandbox_id)
    content = bytearray()
    try:
        async with async_host().read_part(sandbox.pk, checked, wanted) as (part, pieces):
            async for piece in pieces:
                content += piece
                # An older host knows no ``most``; leaving ends the transfer.
                if len(content) >= most:
                    break
    except host_errors.HostError as error:
        if (paused := translate_paused(actor, sandbox, error)) is not None:
            raise paused from error
        raise await in_thread(file_error, sandbox, error) from error
    return file_range(checked, part, bytes(content[:most]))


def find_readable(actor: Actor, sandbox_id: str) -> Sandbox:
    """The row of a sandbox whose files the caller may read."""
    actor.require(READ)
    return find_awake(actor, sandbox_id)


def file_range(path: str, part: FilePart, content: bytes) -> FileRange:
    """The part that was read."""
    return FileRange(path, part.stat.size, part.first, content)


@in_steps
@audited("file.write", "sandbox", note=lambda done, spec: {"path": spec.path, "bytes": done.size})
def edit_file(actor: Actor, sandbox_id: str, spec: EditSpec) -> Steps[EditedFile]:
    """Replace text in a file, whole or not at all; its mode and owner stay.

    Raises ``NotFound``, ``Conflict`` (the text is not there as often as expected),
    ``PayloadTooLarge``, ``InvalidInput`` (outside the writable roots).
    """
    actor.require(WRITE)
    request = EditFile(
        writable_path(spec.path), spec.old, spec.new, None if spec.replace_all else spec.count
    )

    def edit(sandbox: Sandbox) -> Steps[EditedFile]:
        return ask(HostClient.edit_file, sandbox.pk, request)

    return (yield from in_running(actor, sandbox_id, edit))

"""The agent's side of file operations in a container.

Each runs in a process attached to the container (:mod:`hostruntime.container.inside_files`); errors
there are raised here as the matching class of :mod:`hostruntime.errors`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from typing import Any

from hostruntime.container.inside_files import CHUNK_BYTES, LENGTH, MAX_EDIT_BYTES
from hostruntime.container.launcher import Attached, LauncherPool
from hostruntime.errors import Exhausted, HostError, InvalidRequest
from hostruntime.host.patience import Patience
from hostruntime.wire.files import (
    DirectoryEntries,
    DirectoryEntry,
    EditedFile,
    EditFile,
    FilePart,
    FileStat,
    Survey,
    WantedPart,
)
from hostruntime.wire.message import MalformedError, Message, from_fields

MAX_PATH_BYTES = 4096
# How long the process inside may be idle during one step (hostruntime.host.patience).
_STEP_TIMEOUT_SECONDS = 60.0
_END_TIMEOUT_SECONDS = 5.0


@dataclass(frozen=True)
class OpenedPath:
    """A path opened for reading: its stat, and its content, or its entries if a directory."""

    stat: FileStat
    entries: tuple[DirectoryEntry, ...] | None
    content: AsyncIterator[bytes]


@dataclass(frozen=True)
class OpenedPart:
    """A part of a file, opened for reading; shorter than it says if the file has been cut."""

    part: FilePart
    content: AsyncIterator[bytes]


@dataclass(frozen=True)
class FileService:
    """File operations on running containers, by container name."""

    launchers: LauncherPool

    @asynccontextmanager
    async def read(
        self, name: str, path: str, *, max_bytes: int | None = None
    ) -> AsyncIterator[OpenedPath]:
        """Open a file or a directory.

        Raises NotFound, FileConflict (a device, a pipe), FileTooLarge (over ``max_bytes``),
        InvalidRequest.
        """
        arguments = {"path": validate_path(path), "max_bytes": max_bytes}
        async with self._operation(name, "read", arguments) as peer:
            header = await peer.header()
            stat, entries = _parse_answer(FileStat, header.get("stat")), None
            if stat.is_dir:
                entries = _parse_answer(DirectoryEntries, header).entries
            yield OpenedPath(stat, entries, peer.chunks())

    @asynccontextmanager
    async def read_part(
        self, name: str, path: str, wanted: WantedPart
    ) -> AsyncIterator[OpenedPart]:
        """Open a part of a file.

        Raises NotFound, FileConflict (not a file), RangeNotSatisfiable, InvalidRequest.
        """
        arguments = {"path": validate_path(path), **asdict(wanted)}
        async with self._operation(name, "read_part", arguments) as peer:
            part = _parse_answer(FilePart, await peer.header())
            yield OpenedPart(part, peer.chunks())

    async def write(
        self,
        name: str,
        path: str,
        content: AsyncIterator[bytes],
        *,
        mode: int | None,
        size: int | None = None,
    ) -> int:
        """Write a file atomically; return its size.

        Missing parents are created; ``mode`` None keeps an existing file's mode, else 0o644.  With
        the ``size`` to come, in bytes, what cannot fit is refused at once.
        Raises FileConflict, NoSpace, InvalidRequest.
        """
        arguments = {"path": validate_path(path), "mode": mode, "size": size}
        async with self._operation(name, "write", arguments) as peer:
            return int((await peer.send(content))["size"])

    async def edit(self, name: str, request: EditFile) -> EditedFile:
        """Replace text in a file atomically; its mode and owner stay.

        Raises NotFound, FileConflict, TextNotFound (not as often as it should be), FileTooLarge
        (before or afterwards), NoSpace, InvalidRequest.
        """
        old, new = request.old.encode(), request.new.encode()
        if not old or len(old) + len(new) > MAX_EDIT_BYTES:
            raise InvalidRequest(f"The text must have 1 to {MAX_EDIT_BYTES:,} bytes altogether.")
        path = validate_path(request.path)
        arguments = {"path": path, "old": len(old), "count": request.count}
        async with self._operation(name, "edit", arguments) as peer:
            return _parse_answer(EditedFile, await peer.send(_pieces(old, new)))

    async def delete(self, name: str, path: str) -> None:
        """Delete a file, a link or a whole directory.  Raises NotFound, FileConflict."""
        await self._run_simple(name, "delete", {"path": validate_path(path)})

    async def mkdir(self, name: str, path: str, *, parents: bool) -> None:
        """Create a directory.  Raises NotFound (no parent), FileConflict (exists)."""
        await self._run_simple(name, "mkdir", {"path": validate_path(path), "parents": parents})

    async def move(self, name: str, source: str, destination: str) -> None:
        """Rename, also across file systems.  Raises NotFound, FileConflict."""
        arguments = {"source": validate_path(source), "destination": validate_path(destination)}
        await self._run_simple(name, "move", arguments)

    async def stat(self, name: str, path: str) -> FileStat:
        """The stat of a path; ``exists`` is false if there is nothing."""
        return _parse_answer(
            FileStat, await self._run_simple(name, "stat", {"path": validate_path(path)})
        )

    async def survey(
        self, name: str, path: str, max_bytes: int, directories: Sequence[str]
    ) -> Survey:
        """Read up to ``max_bytes`` of a file and list directories, as far as that is possible."""
        arguments = {"path": path, "max_bytes": max_bytes, "directories": list(directories)}
        return _parse_answer(Survey, await self._run_simple(name, "survey", arguments))

    async def _run_simple(
        self, name: str, operation: str, arguments: dict[str, Any]
    ) -> dict[str, Any]:
        async with self._operation(name, operation, arguments) as peer:
            return await peer.header()

    @asynccontextmanager
    async def _operation(
        self, name: str, operation: str, arguments: Mapping[str, Any]
    ) -> AsyncIterator[_Peer]:
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                message: dict[str, Any] = {"call": "file", "name": name, "operation": operation}
                message["arguments"] = dict(arguments)
                attached = await self.launchers.attach(message, [theirs.fileno()])
            except BaseException:
                ours.close()
                raise
        reader, writer = await asyncio.open_connection(sock=ours, limit=2 * CHUNK_BYTES)
        try:
            yield _Peer(reader, writer, attached)
        finally:
            writer.transport.abort()
            with contextlib.suppress(TimeoutError, HostError):
                async with Patience(_END_TIMEOUT_SECONDS, lambda: [attached.pid]):
                    await asyncio.shield(attached.exit_status)
            if not attached.exit_status.done():
                await attached.kill()


@dataclass(frozen=True)
class _Peer:
    """The connection to the process inside."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    process: Attached

    def patience(self) -> Patience:
        """The timeout of one step."""
        return Patience(_STEP_TIMEOUT_SECONDS, lambda: [self.process.pid])

    async def header(self) -> dict[str, Any]:
        """The response of the process inside.  Raises HostError."""
        try:
            async with self.patience():
                return await self.answer()
        except TimeoutError:
            raise Exhausted("The sandbox did not finish the file operation in time.") from None

    async def answer(self) -> dict[str, Any]:
        """Like :meth:`header`, without a timeout."""
        try:
            (length,) = LENGTH.unpack(await self.reader.readexactly(LENGTH.size))
            header: dict[str, Any] = json.loads(await self.reader.readexactly(length))
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            raise Exhausted(
                "The file operation was killed inside the sandbox: it is out of memory, or ended."
            ) from error
        if "code" in header:
            raise HostError.from_wire(header)
        return header

    async def send(self, content: AsyncIterator[bytes]) -> dict[str, Any]:
        """Send the content; the response, which may come before its end."""
        answer = asyncio.ensure_future(self.answer())
        sending = asyncio.ensure_future(self.upload(content))
        try:
            # An answer before the end of the content is a refusal.
            await asyncio.wait({answer, sending}, return_when=asyncio.FIRST_COMPLETED)
            if not answer.done():
                sending.result()
            async with self.patience():
                return await answer
        except TimeoutError:
            raise Exhausted("The sandbox did not finish writing the file in time.") from None
        finally:
            answer.cancel()
            sending.cancel()
            await asyncio.gather(answer, sending, return_exceptions=True)

    async def chunks(self) -> AsyncIterator[bytes]:
        while True:
            try:
                async with self.patience():
                    chunk = await self.reader.read(CHUNK_BYTES)
            except (TimeoutError, ConnectionError) as error:
                raise Exhausted("The file could not be read to its end.") from error
            if not chunk:
                return
            yield chunk

    async def upload(self, content: AsyncIterator[bytes]) -> None:
        """Send the content."""
        async for data in content:
            if data:
                # Not joined, which would copy it; and writelines() never waits (CVE-2024-12254).
                self.writer.write(LENGTH.pack(len(data)))
                self.writer.write(data)
                await self._drain()
        self.writer.write(LENGTH.pack(0))
        await self._drain()

    async def _drain(self) -> None:
        try:
            async with self.patience():
                await self.writer.drain()
        except TimeoutError:
            raise Exhausted("The sandbox didn't accept the file's content in time.") from None
        except ConnectionError:
            return  # The process inside has exited: its response, or the lack of one, says why.


async def _pieces(*content: bytes) -> AsyncIterator[bytes]:
    for piece in content:
        yield piece


def _parse_answer[M: Message](kind: type[M], fields: object) -> M:
    """Parse a response from inside.  Raises Exhausted if it has been tampered with there."""
    try:
        return from_fields(kind, fields)
    except MalformedError as error:
        raise Exhausted("The answer of the sandbox to the file operation is not valid.") from error


def validate_path(path: str) -> str:
    """Return the path if it can be sent inside.  Raises InvalidRequest."""
    if not path:
        raise InvalidRequest("The path is empty; give an absolute path such as /workspace/a.txt.")
    if "\0" in path:
        raise InvalidRequest("The path contains a NUL character, which no file name can.")
    if len(path.encode("utf-8", "surrogateescape")) > MAX_PATH_BYTES:
        raise InvalidRequest(f"The path is over {MAX_PATH_BYTES} bytes long.")
    return path

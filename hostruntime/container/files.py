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
from dataclasses import dataclass
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
    FileStat,
    Survey,
)
from hostruntime.wire.message import MalformedError, Message, from_fields

MAX_PATH_BYTES = 4096
# How long the process inside may be idle during one step (hostruntime.host.patience).
_STEP_TIMEOUT_SECONDS = 60.0
_END_TIMEOUT_SECONDS = 5.0
# Of socket(7), and what waits in one direction of a stream: twice as much by the kernel's count.
_SO_SNDBUFFORCE, _STREAM_BYTES = 32, 512 * 1024
# Of an answer about one file, whose path is in it; and of a directory's names, each of which JSON
# may take 1.5 KiB for.
_MAX_ANSWER_BYTES, _MAX_LISTING_BYTES = 64 * 1024, 128 * 1024 * 1024
_NOT_IN_TIME = "The sandbox did not finish the file operation in time."
_NOT_VALID = "The answer of the sandbox to the file operation is not valid."
_KILLED = "The file operation was killed inside the sandbox: it is out of memory, or ended."


@dataclass(frozen=True)
class OpenedPath:
    """A path opened for reading: its stat, and its content, or its entries if a directory."""

    stat: FileStat
    entries: tuple[DirectoryEntry, ...] | None
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
            stat, entries = parse_answer(FileStat, header.get("stat")), None
            if stat.is_dir:
                entries = parse_answer(DirectoryEntries, header).entries
            yield OpenedPath(stat, entries, peer.chunks())

    async def write(
        self,
        name: str,
        path: str,
        content: AsyncIterator[bytes],
        *,
        mode: int | None,
    ) -> int:
        """Write a file atomically; return its size.

        Missing parents are created; ``mode`` None keeps an existing file's mode, else 0o644.
        Raises FileConflict, NoSpace, InvalidRequest.
        """
        arguments = {"path": validate_path(path), "mode": mode}
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
            return parse_answer(EditedFile, await peer.send(_pieces(old, new)))

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
        return parse_answer(
            FileStat, await self._run_simple(name, "stat", {"path": validate_path(path)})
        )

    async def survey(
        self, name: str, path: str, max_bytes: int, directories: Sequence[str]
    ) -> Survey:
        """Read up to ``max_bytes`` of a file and list directories, as far as that is possible."""
        arguments = {"path": path, "max_bytes": max_bytes, "directories": list(directories)}
        return parse_answer(Survey, await self._run_simple(name, "survey", arguments))

    async def _run_simple(
        self, name: str, operation: str, arguments: dict[str, Any]
    ) -> dict[str, Any]:
        async with self._operation(name, operation, arguments) as peer:
            return await peer.header()

    @asynccontextmanager
    async def _operation(
        self, name: str, operation: str, arguments: Mapping[str, Any]
    ) -> AsyncIterator[_Peer]:
        ours, attached = await self._enter(name, operation, arguments)
        reader, writer = await asyncio.open_connection(sock=ours, limit=2 * CHUNK_BYTES)
        try:
            yield _Peer(reader, writer, attached)
        finally:
            writer.transport.abort()
            await _end(attached)

    @asynccontextmanager
    async def handed_over(
        self, name: str, operation: str, arguments: Mapping[str, Any]
    ) -> AsyncIterator[Stream]:
        """Start an operation whose bytes somebody else passes on; it ends with the block."""
        ours, attached = await self._enter(name, operation, arguments, large=True)
        with ours:
            ours.setblocking(False)  # noqa: FBT003 - positional-only
            try:
                yield Stream(ours, attached)
            finally:
                # Whoever has a copy of it loses the connection, too.
                with contextlib.suppress(OSError):
                    ours.shutdown(socket.SHUT_RDWR)
                await _end(attached)

    async def _enter(
        self, name: str, operation: str, arguments: Mapping[str, Any], *, large: bool = False
    ) -> tuple[socket.socket, Attached]:
        """Start the process inside; our end of the connection to it."""
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                if large:
                    for end in (ours, theirs):
                        _enlarge(end)
                message: dict[str, Any] = {"call": "file", "name": name, "operation": operation}
                message["arguments"] = dict(arguments)
                return ours, await self.launchers.attach(message, [theirs.fileno()])
            except BaseException:
                ours.close()
                raise


def _enlarge(sock: socket.socket) -> None:
    """Have a socket take several pieces at once, so that its two sides needn't take turns."""
    try:
        sock.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, _STREAM_BYTES)
    except PermissionError:
        # Without CAP_NET_ADMIN, as much as the machine allows anybody.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _STREAM_BYTES)


async def _end(attached: Attached) -> None:
    """Wait for the process inside, which has lost its connection, or kill it."""
    with contextlib.suppress(TimeoutError, HostError):
        async with Patience(_END_TIMEOUT_SECONDS, lambda: [attached.pid]):
            await asyncio.shield(attached.exit_status)
    if not attached.exit_status.done():
        await attached.kill()


@dataclass(frozen=True)
class Stream:
    """One end of a stream, and the process inside that has the other."""

    sock: socket.socket
    process: Attached

    async def header(self) -> dict[str, Any]:
        """The next answer of the process inside.  Raises HostError."""
        try:
            async with Patience(_STEP_TIMEOUT_SECONDS, lambda: [self.process.pid]):
                return await self.answer()
        except TimeoutError:
            raise Exhausted(_NOT_IN_TIME) from None

    async def answer(self) -> dict[str, Any]:
        """Like :meth:`header`, without a timeout."""
        try:
            length = _length(await self._exactly(LENGTH.size), _MAX_ANSWER_BYTES)
            answer = await self._exactly(length)
        except OSError as error:
            raise Exhausted(_KILLED) from error
        return _parsed(answer)

    async def _exactly(self, size: int) -> bytes:
        """So many bytes and no more: what follows is not ours.  Raises ConnectionError."""
        loop, data = asyncio.get_running_loop(), b""
        while len(data) < size:
            part = await loop.sock_recv(self.sock, size - len(data))
            if not part:
                raise ConnectionResetError
            data += part
        return data


def _length(prefix: bytes, most: int) -> int:
    """The length of an answer.  Raises Exhausted if none of ours is as long."""
    (length,) = LENGTH.unpack(prefix)
    if length > most:
        raise Exhausted(_NOT_VALID)
    return int(length)


def _parsed(answer: bytes) -> dict[str, Any]:
    """The answer of a process inside.  Raises the HostError that it is."""
    try:
        header = json.loads(answer)
    except (ValueError, RecursionError) as error:
        raise Exhausted(_NOT_VALID) from error
    if not isinstance(header, dict):
        raise Exhausted(_NOT_VALID)
    if "code" in header:
        raise HostError.from_wire(header)
    return header


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
            raise Exhausted(_NOT_IN_TIME) from None

    async def answer(self) -> dict[str, Any]:
        """Like :meth:`header`, without a timeout."""
        try:
            length = _length(await self.reader.readexactly(LENGTH.size), _MAX_LISTING_BYTES)
            answer = await self.reader.readexactly(length)
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            raise Exhausted(_KILLED) from error
        return _parsed(answer)

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


def parse_answer[M: Message](kind: type[M], fields: object) -> M:
    """Parse a response from inside.  Raises Exhausted if it has been tampered with there."""
    try:
        return from_fields(kind, fields)
    except MalformedError as error:
        raise Exhausted(_NOT_VALID) from error


def validate_path(path: str) -> str:
    """Return the path if it can be sent inside.  Raises InvalidRequest."""
    if not path:
        raise InvalidRequest("The path is empty; give an absolute path such as /workspace/a.txt.")
    if "\0" in path:
        raise InvalidRequest("The path contains a NUL character, which no file name can.")
    if len(path.encode("utf-8", "surrogateescape")) > MAX_PATH_BYTES:
        raise InvalidRequest(f"The path is over {MAX_PATH_BYTES} bytes long.")
    return path

"""The container's side of file operations, run as its root.

Runs in a process that a launcher put there, like :mod:`hostruntime.container.inside_exec`: every
path is resolved in the container's namespaces, so nothing a tenant plants in its tree (links,
mounts, devices) can lead to the host.  The process talks to the agent over one socket: it sends a
header (a 4-byte length and JSON), then the raw bytes of a file being read; a file being written
arrives as length-prefixed chunks, of which one of length zero marks the end, or if its size was
given, as it is.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import signal
import socket
import stat
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from hostruntime.container import inside_text
from hostruntime.container.inside_refusals import TEMPORARY, Refusal, explain

LENGTH = struct.Struct("!I")
CHUNK_BYTES = 256 * 1024
MAX_ENTRIES = 50_000
MAX_UNSIZED_BYTES = 16 * 1024 * 1024
# What is replaced and what replaces it, together.
MAX_EDIT_BYTES = 2 * 1024 * 1024
# So much of a file is sent in one system call.
SEND_BYTES = 1024 * 1024
HOME = "/workspace"
_DESCRIPTOR, _GATE = 3, 4
# What open(2) says where O_TMPFILE is unknown: to the file system, or to the kernel.
_NO_TMPFILE = frozenset({errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT})


def serve(operation: str, arguments: Mapping[str, Any], descriptor: int, gate: int) -> NoReturn:
    """Perform one operation for the agent at the other end of ``descriptor``, and exit.

    ``gate`` delivers one byte once this process is in the container's control groups.
    """
    try:
        # First close the launcher's descriptors, including the gate's write end: if the launcher
        # dies now, reading the gate must not block.
        keep_only(descriptor, gate)
        if os.read(_GATE, 1) != b"1":
            os._exit(1)
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        os.setsid()
        os.umask(0o022)
        with socket.socket(fileno=_DESCRIPTOR) as peer:
            perform(operation, arguments, peer)
    finally:
        os._exit(0)


def keep_only(*descriptors: int) -> None:
    """Renumber these right after the standard descriptors, and close all others."""
    above = _DESCRIPTOR + len(descriptors)
    high = [fcntl.fcntl(each, fcntl.F_DUPFD_CLOEXEC, above) for each in descriptors]
    for number, each in enumerate(high, _DESCRIPTOR):
        os.dup2(each, number, inheritable=False)
    os.closerange(above, 1 << 30)


def perform(operation: str, arguments: Mapping[str, Any], peer: socket.socket) -> None:
    """Perform one operation and respond; only a broken connection raises."""
    try:
        with contextlib.suppress(OSError):
            os.chdir(HOME)
        _OPERATIONS[operation](peer, arguments)
    except Refusal as refusal:
        _refuse(peer, refusal.code, refusal.detail, **refusal.extra)
    except OSError as error:
        path = str(arguments.get("path") or arguments.get("source"))
        _refuse(peer, *explain(error, path))
    except (ValueError, RuntimeError) as error:
        _refuse(peer, "invalid_request", f"The path is not usable: {error}.")


def _refuse(peer: socket.socket, code: str, detail: str, **extra: Any) -> None:
    _answer(peer, {"code": code, "detail": detail, **extra})
    # Closing with unread data would reset the connection, and the response might be lost.
    while peer.recv(CHUNK_BYTES):
        pass


def _answer(peer: socket.socket, header: Mapping[str, Any]) -> None:
    body = json.dumps(header).encode()
    peer.sendall(LENGTH.pack(len(body)) + body)


# Operations --------------------------------------------------------------------------------


def _read(peer: socket.socket, arguments: Mapping[str, Any]) -> None:
    path, cap = str(arguments["path"]), arguments.get("max_bytes")
    with _open_readable(path) as fd:
        status = os.fstat(fd)
        if stat.S_ISDIR(status.st_mode):
            _answer(peer, {"stat": _describe(path, status), "entries": _entries(fd, path)})
            return
        if cap is not None and status.st_size > cap:
            raise Refusal(
                "file_too_large", f"{path} has {status.st_size} bytes; at most {cap} can be read."
            )
        _answer(peer, {"stat": _describe(path, status)})
        with _cut_short():
            _send_file(peer, fd, cap)


@contextlib.contextmanager
def _cut_short() -> Iterator[None]:
    """Send no more of a file that can't be read on: an answer would be taken for its content."""
    with contextlib.suppress(OSError):
        yield


def _send_file(peer: socket.socket, fd: int, cap: int | None) -> None:
    remaining = cap
    while remaining is None or remaining > 0:
        # Files in /proc have no size: only reading finds their end.
        data = os.read(fd, CHUNK_BYTES if remaining is None else min(CHUNK_BYTES, remaining))
        if not data:
            return
        peer.sendall(data)
        remaining = None if remaining is None else remaining - len(data)


def _read_part(peer: socket.socket, arguments: Mapping[str, Any]) -> None:
    """Send the bytes that ``first`` and ``last`` ask for, as in a range (RFC 9110, 14.1.2)."""
    path = str(arguments["path"])
    with _open_readable(path) as fd:
        status = os.fstat(fd)
        if stat.S_ISDIR(status.st_mode):
            raise Refusal("file_conflict", f"{path} is a directory, not a file.")
        content = _small_content(fd, path, status.st_size)
        size = status.st_size if content is None else len(content)
        first, length = _wanted(fd, content, path, size, arguments)
        described = {**_describe(path, status), "size": size}
        _answer(peer, {"stat": described, "first": first, "length": length})
        if content is None:
            with _cut_short():
                _send_bytes(peer, fd, first, length)
        else:
            peer.sendall(content[first : first + length])


def _small_content(fd: int, path: str, size: int) -> bytes | None:
    """All of a file that says it is small; those in /proc and /sys don't know their size."""
    if size > CHUNK_BYTES:
        return None
    content = b""
    while data := os.read(fd, CHUNK_BYTES):
        content += data
        if len(content) > MAX_UNSIZED_BYTES:
            raise Refusal(
                "file_too_large", f"{path} grows while it is read; copy it, and read the copy."
            )
    return content


def _wanted(
    fd: int, content: bytes | None, path: str, size: int, arguments: Mapping[str, Any]
) -> tuple[int, int]:
    """The offset and the length of what is asked for, by bytes or by lines."""
    most = arguments.get("most")
    if (line := arguments.get("line")) is None:
        first, length = _part(path, size, arguments.get("first"), arguments.get("last"))
        return first, length if most is None else min(length, most)
    most = CHUNK_BYTES if most is None else min(most, CHUNK_BYTES)
    with _refusing(path, size=size):
        read_at = inside_text.reader(fd, content)
        return inside_text.line_range(read_at, size, line, arguments.get("lines"), most)


@contextlib.contextmanager
def _refusing(path: str | Path, **extra: Any) -> Iterator[None]:
    try:
        yield
    except inside_text.TextError as error:
        raise Refusal(error.code, f"{path} {error.detail}.", **extra) from None


def _part(path: str, size: int, first: int | None, last: int | None) -> tuple[int, int]:
    """The offset and the length; without ``first``, of the ``last`` so many bytes."""
    if first is None:
        length = size if last is None else min(last, size)
        if last is None or length:
            return size - length, length
    elif first < size:
        return first, size - first if last is None else min(last + 1, size) - first
    raise Refusal(
        "range_not_satisfiable",
        f"{path} has {size} bytes, none of which is in the range.",
        size=size,
    )


def _send_bytes(peer: socket.socket, fd: int, first: int, length: int) -> None:
    """Send so many bytes, without copying them here; fewer if the file has become shorter."""
    while length:
        sent = os.sendfile(peer.fileno(), fd, first, min(length, SEND_BYTES))
        if not sent:
            return
        first += sent
        length -= sent


def _survey(peer: socket.socket, arguments: Mapping[str, Any]) -> None:
    head, cap = None, int(arguments["max_bytes"])
    with contextlib.suppress(OSError, Refusal), _open_readable(str(arguments["path"])) as fd:
        head = _head(fd, cap).hex()
    _answer(peer, {"head": head, "names": list(map(_names, arguments["directories"]))})


def _head(fd: int, size: int) -> bytes:
    data = b""
    while len(data) < size and (part := os.read(fd, size - len(data))):
        data += part
    return data


def _names(directory: str) -> list[str] | None:
    """The names in a directory; None if they cannot be listed, or are too many."""
    names: list[str] = []
    try:
        with _open_readable(directory) as fd, os.scandir(fd) as entries:
            for entry in entries:
                if len(names) >= MAX_ENTRIES:
                    return None
                names.append(_text(entry.name))
    except (OSError, Refusal):
        return None
    return names


def _text(name: str) -> str:
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _entries(fd: int, path: str) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = []
    with os.scandir(fd) as names:
        for name in names:
            if len(entries) >= MAX_ENTRIES:
                raise Refusal("file_too_large", f"{path} has over {MAX_ENTRIES} entries.")
            with contextlib.suppress(FileNotFoundError):
                entries.append(_entry(name))
    return sorted(entries, key=lambda entry: str(entry["name"]))


def _entry(name: os.DirEntry[str]) -> dict[str, Any]:
    status = name.stat(follow_symlinks=False)
    return {
        "name": _text(name.name),
        "is_dir": name.is_dir(),
        "size": status.st_size,
        "mode": stat.S_IMODE(status.st_mode),
        "modified_at": status.st_mtime,
    }


def _write(peer: socket.socket, arguments: Mapping[str, Any]) -> None:
    """Write a file; with a ``size``, its content comes as it is, after a first answer."""
    path, mode = Path(os.path.realpath(str(arguments["path"]))), arguments.get("mode")
    existing, size = _existing_file(path), arguments.get("size")
    path.parent.mkdir(parents=True, exist_ok=True)
    if size is not None:
        _require_space(path.parent, size)
    with _new_file(path) as fd:
        if size is None:
            size = _receive_file(peer, fd)
        else:
            _answer(peer, {})
            _receive_bytes(peer, fd, size)
        if existing is not None:
            os.fchown(fd, existing.st_uid, existing.st_gid)
        current_mode = 0o644 if existing is None else stat.S_IMODE(existing.st_mode)
        os.fchmod(fd, current_mode if mode is None else mode)
    _answer(peer, {"size": size})


def _edit(peer: socket.socket, arguments: Mapping[str, Any]) -> None:
    """Replace text in a file; ``old`` many bytes of the upload are what is replaced.

    As it is written anew, a link's target is replaced rather than the link, like in :func:`_write`.
    """
    texts = _receive_text(peer)
    old, new = texts[: arguments["old"]], texts[arguments["old"] :]
    path = Path(os.path.realpath(str(arguments["path"])))
    if (existing := _existing_file(path)) is None:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    with _open_readable(str(path)) as fd:
        content = _editable_content(fd, path)
    with _refusing(path):
        edited = inside_text.replaced(content, old, new, arguments["count"])
    with _new_file(path) as fd:
        _write_all(fd, memoryview(edited.content))
        os.fchown(fd, existing.st_uid, existing.st_gid)
        os.fchmod(fd, stat.S_IMODE(existing.st_mode))
        _require_unchanged(path, existing)
    size = len(edited.content)
    _answer(peer, {"path": str(path), "size": size, "count": edited.times, "line": edited.line})


def _receive_text(peer: socket.socket) -> bytes:
    """What is uploaded, all of it."""
    text = b""
    while length := LENGTH.unpack(_receive_exactly(peer, LENGTH.size))[0]:
        if len(text) + length > MAX_EDIT_BYTES:
            raise Refusal("file_too_large", f"An edit has over {MAX_EDIT_BYTES:,} bytes of text.")
        text += _receive_exactly(peer, length)
    return text


def _editable_content(fd: int, path: Path) -> bytes:
    content = bytearray()
    while data := os.read(fd, CHUNK_BYTES):
        content += data
        if len(content) > inside_text.MAX_EDITED_BYTES:
            raise Refusal("file_too_large", f"{path} {inside_text.TOO_LARGE}")
    return bytes(content)


def _require_unchanged(path: Path, before: os.stat_result) -> None:
    """Refuse to replace what somebody has written since it was read."""
    now = _existing_file(path)
    same = ("st_ino", "st_size", "st_mtime_ns")
    if now is None or any(getattr(now, name) != getattr(before, name) for name in same):
        raise Refusal("file_conflict", f"{path} was changed meanwhile; read it and try again.")


def _require_space(directory: Path, size: int) -> None:
    """Refuse at once what can't fit: whoever sends it need not send all of it first."""
    status = os.statvfs(directory)
    # A tmpfs without a limit says that it has no blocks at all.
    if status.f_blocks and size > status.f_bavail * status.f_frsize:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@contextlib.contextmanager
def _new_file(path: Path) -> Iterator[int]:
    """A file to write to, which replaces ``path`` at the end of the block unless that raises.

    Until then it has no name (O_TMPFILE, open(2)), so nothing of it is left however this process
    ends, and no snapshot has it.  Where the file system lacks that, it has a temporary name.
    """
    temporary = _temporary_path(path)
    try:
        fd = os.open(path.parent, os.O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC, 0o600)
        named = False
    except OSError as error:
        if error.errno not in _NO_TMPFILE:
            raise
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(temporary, flags, 0o600)
        named = True
    try:
        yield fd
        if not named:
            _give_name(fd, temporary)
        # link(2) replaces nothing.
        temporary.rename(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    finally:
        os.close(fd)


def _give_name(fd: int, path: Path) -> None:
    """Link a file without a name to ``path``, as open(2) describes for O_TMPFILE."""
    # Only with a directory's descriptor does Python pass AT_SYMLINK_FOLLOW on (linkat(2)).
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.link(f"/proc/self/fd/{fd}", path, src_dir_fd=directory, follow_symlinks=True)
    finally:
        os.close(directory)


def _temporary_path(path: Path) -> Path:
    return path.parent / f"{TEMPORARY}{os.urandom(6).hex()}"


def _existing_file(path: Path) -> os.stat_result | None:
    try:
        status = path.lstat()
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(status.st_mode):
        raise Refusal("file_conflict", f"{path} is {_kind(status.st_mode)}; it is not replaced.")
    return status


def _receive_file(peer: socket.socket, fd: int) -> int:
    total = 0
    while length := LENGTH.unpack(_receive_exactly(peer, LENGTH.size))[0]:
        _receive_bytes(peer, fd, length)
        total += length
    return total


def _receive_bytes(peer: socket.socket, fd: int, size: int) -> None:
    """Write the next so many bytes to a file."""
    buffer = memoryview(bytearray(min(size, CHUNK_BYTES)))
    while size:
        count = peer.recv_into(buffer, min(size, CHUNK_BYTES))
        if not count:
            raise Refusal("invalid_request", "The upload ended before all of it had arrived.")
        size -= count
        _write_all(fd, buffer[:count])


def _write_all(fd: int, data: memoryview) -> None:
    while data:
        data = data[os.write(fd, data) :]


def _receive_exactly(peer: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = peer.recv(size - len(data))
        if not part:
            raise Refusal("invalid_request", "The upload ended before all of it had arrived.")
        data += part
    return data


def _delete(peer: socket.socket, arguments: Mapping[str, Any]) -> None:
    path = Path(str(arguments["path"]))
    status = path.lstat()
    if os.path.ismount(path):
        raise Refusal("file_conflict", f"{path} is a mount point; delete what is in it instead.")
    if stat.S_ISDIR(status.st_mode):
        shutil.rmtree(path)
    else:
        path.unlink()
    _answer(peer, {})


def _mkdir(peer: socket.socket, arguments: Mapping[str, Any]) -> None:
    parents = bool(arguments.get("parents"))
    Path(str(arguments["path"])).mkdir(parents=parents, exist_ok=parents)
    _answer(peer, {})


def _move(peer: socket.socket, arguments: Mapping[str, Any]) -> None:
    source, destination = (Path(str(arguments[name])) for name in ("source", "destination"))
    source.lstat()
    if os.path.ismount(source):
        raise Refusal("file_conflict", f"{source} is a mount point; move what is in it instead.")
    if destination.is_dir() and not destination.is_symlink():
        raise Refusal("file_conflict", f"{destination} is a directory; give the full new path.")
    if not destination.parent.is_dir():
        raise Refusal("not_found", f"{destination.parent} is not a directory; create it first.")
    try:
        source.rename(destination)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        # /workspace and /tmp are different file systems.
        _copy_over(source, destination)
    _answer(peer, {})


def _copy_over(source: Path, destination: Path) -> None:
    temporary = _temporary_path(destination)
    try:
        shutil.move(source, temporary)
        temporary.rename(destination)
    except shutil.Error as error:
        # A directory into itself, or a special file: an OSError without a number.
        raise Refusal("file_conflict", f"{source} cannot be moved there: {error}.") from error


def _stat(peer: socket.socket, arguments: Mapping[str, Any]) -> None:
    path = str(arguments["path"])
    try:
        status = Path(path).stat()
    except (FileNotFoundError, NotADirectoryError):
        try:
            status = Path(path).lstat()
        except (FileNotFoundError, NotADirectoryError):
            _answer(peer, {"path": path, "exists": False})
            return
    _answer(peer, _describe(path, status))


_OPERATIONS: Mapping[str, Callable[[socket.socket, Mapping[str, Any]], None]] = {
    "read": _read,
    "read_part": _read_part,
    "write": _write,
    "edit": _edit,
    "delete": _delete,
    "mkdir": _mkdir,
    "move": _move,
    "stat": _stat,
    "survey": _survey,
}
OPERATIONS = frozenset(_OPERATIONS)


# Opening and describing --------------------------------------------------------------------


@contextlib.contextmanager
def _open(path: str | Path, flags: int) -> Iterator[int]:
    fd = os.open(path, flags | os.O_CLOEXEC, 0o600)
    try:
        yield fd
    finally:
        os.close(fd)


@contextlib.contextmanager
def _open_readable(path: str) -> Iterator[int]:
    """Open a file or directory for reading once it is known to belong to the sandbox.

    Opening a FIFO would block until its other end is opened; opening a device may have effects.
    """
    path_fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        _require_readable(path, os.fstat(path_fd).st_mode)
        _refuse_own_process(path, path_fd)
        with _open(f"/proc/self/fd/{path_fd}", os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY) as fd:
            yield fd
    finally:
        os.close(path_fd)


def _refuse_own_process(path: str, path_fd: int) -> None:
    """Refuse this process's files in /proc, and the host's interpreter that it runs (proc(5)).

    Its descriptors are sockets; its root and working directory are the container's.
    """
    is_own = Path(f"/proc/self/fd/{path_fd}").readlink().is_relative_to(f"/proc/{os.getpid()}")
    if is_own or os.path.samestat(os.fstat(path_fd), Path("/proc/self/exe").stat()):
        raise Refusal(
            "not_found",
            f"{path} belongs to the process that reads files, which is not part of the sandbox. "
            "Run a command to read it there.",
        )


def _describe(path: str, status: os.stat_result) -> dict[str, Any]:
    return {
        "path": path,
        "exists": True,
        "is_dir": stat.S_ISDIR(status.st_mode),
        "size": status.st_size,
        "mode": stat.S_IMODE(status.st_mode),
        "modified_at": status.st_mtime,
    }


def _require_readable(path: str, mode: int) -> None:
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise Refusal("file_conflict", f"{path} is {_kind(mode)}; only files can be read.")


def _kind(mode: int) -> str:
    names: dict[Callable[[int], bool], str] = {
        stat.S_ISDIR: "a directory",
        stat.S_ISLNK: "a symbolic link that leads nowhere",
        stat.S_ISFIFO: "a named pipe",
        stat.S_ISSOCK: "a socket",
        stat.S_ISCHR: "a device",
        stat.S_ISBLK: "a device",
    }
    return next((name for test, name in names.items() if test(mode)), "not a regular file")

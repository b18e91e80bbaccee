"""File operations as they run inside a container, as its root.

Runs in a process that a launcher put there, like :mod:`hostruntime.container.inside_exec`: every
path is walked by the container's own kernel view, so nothing a tenant plants in its tree (links,
mounts, devices) can lead to the host.  The process speaks to the agent over one socket: it sends a
header (a 4-byte length and JSON), then the raw bytes of a file being read; a file being written
arrives as length-prefixed pieces, a piece of length zero meaning that all of it was sent.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import secrets
import shutil
import signal
import socket
import stat
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

LENGTH = struct.Struct("!I")
PIECE_BYTES = 256 * 1024
MAX_ENTRIES = 50_000
HOME = "/workspace"
_DESCRIPTOR, _GATE = 3, 4
_TEMPORARY = ".ork-"


class Refusal(Exception):  # noqa: N818 - an answer, not a defect
    """The operation cannot be done; ``code`` names one of :mod:`hostruntime.errors`."""

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(detail)
        self.code = code
        self.detail = detail


def serve(operation: str, arguments: Mapping[str, Any], descriptor: int, gate: int) -> NoReturn:
    """Do one operation for the agent at the other end of ``descriptor``, and leave.

    ``gate`` gives one byte when this process has its place in the container's control groups.
    """
    try:
        # First all that is the launcher's, with the gate's other end: were that to die now, nobody
        # else would have it.
        _keep_only(descriptor, gate)
        if os.read(_GATE, 1) != b"1":
            os._exit(1)
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        os.setsid()
        os.umask(0o022)
        with socket.socket(fileno=_DESCRIPTOR) as peer:
            perform(operation, arguments, peer)
    finally:
        os._exit(0)


def _keep_only(*descriptors: int) -> None:
    """Give these the first numbers after the standard ones', and close all others."""
    above = _DESCRIPTOR + len(descriptors)
    high = [fcntl.fcntl(each, fcntl.F_DUPFD_CLOEXEC, above) for each in descriptors]
    for number, each in enumerate(high, _DESCRIPTOR):
        os.dup2(each, number, inheritable=False)
    os.closerange(above, 1 << 30)


def perform(operation: str, arguments: Mapping[str, Any], peer: socket.socket) -> None:
    """Do one operation and answer it; nothing escapes but a broken connection."""
    try:
        with contextlib.suppress(OSError):
            os.chdir(HOME)
        _OPERATIONS[operation](peer, arguments)
    except Refusal as refusal:
        _refuse(peer, refusal.code, refusal.detail)
    except OSError as error:
        path = str(arguments.get("path") or arguments.get("source"))
        _refuse(peer, *_explained(error, path))
    except (ValueError, RuntimeError) as error:
        _refuse(peer, "invalid_request", f"The path is not usable: {error}.")


def _refuse(peer: socket.socket, code: str, detail: str) -> None:
    _answer(peer, {"code": code, "detail": detail})
    # Closing over unread data would reset the connection, and the answer might be lost with it.
    while peer.recv(PIECE_BYTES):
        pass


def _answer(peer: socket.socket, header: Mapping[str, Any]) -> None:
    body = json.dumps(header).encode()
    peer.sendall(LENGTH.pack(len(body)) + body)


# Operations --------------------------------------------------------------------------------


def _read(peer: socket.socket, arguments: Mapping[str, Any]) -> None:
    path, cap = str(arguments["path"]), arguments.get("max_bytes")
    with _readable(path) as fd:
        found = os.fstat(fd)
        if stat.S_ISDIR(found.st_mode):
            if arguments.get("directories") is False:
                raise Refusal("file_conflict", f"{path} is a directory, not a file.")
            _answer(peer, {"stat": _described(path, found), "entries": _entries(fd, path)})
            return
        if cap is not None and found.st_size > cap:
            raise Refusal(
                "file_too_large", f"{path} has {found.st_size} bytes; at most {cap} can be read."
            )
        _answer(peer, {"stat": _described(path, found)})
        _send_file(peer, fd, cap)


def _send_file(peer: socket.socket, fd: int, cap: int | None) -> None:
    left = cap
    while left is None or left > 0:
        # Files of /proc have no size: only reading tells where they end.
        data = os.read(fd, PIECE_BYTES if left is None else min(PIECE_BYTES, left))
        if not data:
            return
        peer.sendall(data)
        left = None if left is None else left - len(data)


def _entries(fd: int, path: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    with os.scandir(fd) as names:
        for name in names:
            if len(found) >= MAX_ENTRIES:
                raise Refusal("file_too_large", f"{path} has over {MAX_ENTRIES} entries.")
            with contextlib.suppress(FileNotFoundError):
                found.append(_entry(name))
    return sorted(found, key=lambda entry: str(entry["name"]))


def _entry(name: os.DirEntry[str]) -> dict[str, Any]:
    itself = name.stat(follow_symlinks=False)
    return {
        "name": name.name.encode("utf-8", "surrogateescape").decode("utf-8", "replace"),
        "is_dir": name.is_dir(),
        "size": itself.st_size,
        "mode": stat.S_IMODE(itself.st_mode),
        "modified_at": itself.st_mtime,
    }


def _write(peer: socket.socket, arguments: Mapping[str, Any]) -> None:
    path, mode = Path(os.path.realpath(str(arguments["path"]))), arguments.get("mode")
    existing = _existing_file(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary_beside(path)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    try:
        with _opened(temporary, flags) as fd:
            size = _receive_file(peer, fd)
            if existing is not None:
                os.fchown(fd, existing.st_uid, existing.st_gid)
            kept = 0o644 if existing is None else stat.S_IMODE(existing.st_mode)
            os.fchmod(fd, kept if mode is None else mode)
        temporary.rename(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    _answer(peer, {"size": size})


def _temporary_beside(path: Path) -> Path:
    return path.parent / f"{_TEMPORARY}{secrets.token_hex(6)}"


def _existing_file(path: Path) -> os.stat_result | None:
    try:
        found = path.lstat()
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(found.st_mode):
        raise Refusal("file_conflict", f"{path} is {_kind(found.st_mode)}; it is not replaced.")
    return found


def _receive_file(peer: socket.socket, fd: int) -> int:
    total = 0
    while True:
        (length,) = LENGTH.unpack(_exactly(peer, LENGTH.size))
        if length == 0:
            return total
        total += length
        while length:
            data = peer.recv(min(length, PIECE_BYTES))
            if not data:
                raise Refusal("invalid_request", "The upload ended before all of it had arrived.")
            length -= len(data)
            _write_all(fd, data)


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def _exactly(peer: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = peer.recv(size - len(data))
        if not part:
            raise Refusal("invalid_request", "The upload ended before all of it had arrived.")
        data += part
    return data


def _delete(peer: socket.socket, arguments: Mapping[str, Any]) -> None:
    path = Path(str(arguments["path"]))
    found = path.lstat()
    if os.path.ismount(path):
        raise Refusal("file_conflict", f"{path} is a mount point; delete what is in it instead.")
    if stat.S_ISDIR(found.st_mode):
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
    temporary = _temporary_beside(destination)
    try:
        shutil.move(source, temporary)
        temporary.rename(destination)
    except shutil.Error as error:
        # A directory into itself, or a special file: an OSError without a number.
        raise Refusal("file_conflict", f"{source} cannot be moved there: {error}.") from error


def _stat(peer: socket.socket, arguments: Mapping[str, Any]) -> None:
    path = str(arguments["path"])
    try:
        found = Path(path).stat()
    except (FileNotFoundError, NotADirectoryError):
        try:
            found = Path(path).lstat()
        except (FileNotFoundError, NotADirectoryError):
            _answer(peer, {"path": path, "exists": False})
            return
    _answer(peer, _described(path, found))


_OPERATIONS: Mapping[str, Callable[[socket.socket, Mapping[str, Any]], None]] = {
    "read": _read,
    "write": _write,
    "delete": _delete,
    "mkdir": _mkdir,
    "move": _move,
    "stat": _stat,
}
OPERATIONS = frozenset(_OPERATIONS)


# Words -------------------------------------------------------------------------------------


@contextlib.contextmanager
def _opened(path: str | Path, flags: int) -> Iterator[int]:
    fd = os.open(path, flags | os.O_CLOEXEC, 0o600)
    try:
        yield fd
    finally:
        os.close(fd)


@contextlib.contextmanager
def _readable(path: str) -> Iterator[int]:
    """A file or directory, opened for reading once it is known to be one of the sandbox's.

    Opening a FIFO would wait for its other end, a device may act on being opened.
    """
    place = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        _require_readable(path, os.fstat(place).st_mode)
        _require_not_ours(path, place)
        with _opened(f"/proc/self/fd/{place}", os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY) as fd:
            yield fd
    finally:
        os.close(place)


def _require_not_ours(path: str, place: int) -> None:
    """Refuse what /proc tells of this process, and the host's interpreter that it runs (proc(5)).

    Its descriptors are sockets, its root and directory are the container's.
    """
    tells = Path(f"/proc/self/fd/{place}").readlink().is_relative_to(f"/proc/{os.getpid()}")
    if tells or os.path.samestat(os.fstat(place), Path("/proc/self/exe").stat()):
        raise Refusal(
            "not_found",
            f"{path} would be of the process that reads files, which is none of the sandbox's. Run "
            "a command to read it there.",
        )


def _described(path: str, found: os.stat_result) -> dict[str, Any]:
    return {
        "path": path,
        "exists": True,
        "is_dir": stat.S_ISDIR(found.st_mode),
        "size": found.st_size,
        "mode": stat.S_IMODE(found.st_mode),
        "modified_at": found.st_mtime,
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


_CODES: Mapping[int, tuple[str, str]] = {
    errno.ENOENT: ("not_found", "{path} does not exist."),
    errno.ENOTDIR: ("file_conflict", "A part of {path} is a file, not a directory."),
    errno.EISDIR: ("file_conflict", "{path} is a directory."),
    errno.EEXIST: ("file_conflict", "{path} already exists."),
    errno.ENOTEMPTY: ("file_conflict", "{path} is a directory that is not empty."),
    errno.EBUSY: ("file_conflict", "{path} is in use as a mount point."),
    errno.ELOOP: ("file_conflict", "{path} is a loop of symbolic links."),
    errno.EROFS: ("file_conflict", "{path} is on a read-only file system."),
    errno.EPERM: ("file_conflict", "{path} can't be changed."),
    errno.EACCES: ("file_conflict", "{path} can't be accessed."),
    errno.ENXIO: ("file_conflict", "{path} is not a regular file."),
    errno.EINVAL: ("file_conflict", "{path} can't be used that way."),
    errno.ENAMETOOLONG: ("invalid_request", "{path} is too long."),
    errno.ENOSPC: ("no_space", "There is no space left for {path}; delete something first."),
    errno.EDQUOT: ("no_space", "There is no space left for {path}; delete something first."),
    errno.EFBIG: ("file_too_large", "{path} would be larger than the file system allows."),
}


def _explained(error: OSError, path: str) -> tuple[str, str]:
    code, sentence = _CODES.get(error.errno or 0, ("internal", "{path}: " + str(error.strerror)))
    where = Path(os.fsdecode(error.filename)).as_posix() if error.filename else path
    return code, sentence.format(path=path if _TEMPORARY in where else where)

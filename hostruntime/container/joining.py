"""Putting what a container is lent together with what its image has, and telling them apart again.

The runtime layer lies over the image and would hide the image's files of the same names.  So for
each image it is joined first: :data:`JOINED` says which files become the image's own lines and
ours, ours between two marks.  A step that changes such a file thereby copies ours into the
writable layer too; :func:`take_back` takes them out of what was captured.

Images are strangers' work.  Their files are opened below the image's root, never beyond a link
out of it, and read only if they are regular and of a bounded size (openat2(2)).  What cannot be
read is left as it is: then we lend nothing there, but for what a container cannot do without.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from secrets import token_hex
from typing import Literal

from hostruntime.container.authorities import certificates, without_certificates
from hostruntime.container.lent_files import CA_BUNDLE, LOCAL_CAS
from hostruntime.host import kernel
from hostruntime.image.trees import list_entries, lstat, open_directory, open_if_directory

BEGIN = b"# orkestr: lent to this container, not part of its image: begin"
END = b"# orkestr: end"
# What stays in an image's file of ours: that they belong there, and where.
PLACE = b"# orkestr: the lines of the host it runs on come here"
MAX_BYTES = 4 * 1024 * 1024
_ESSENTIAL = (".orkestr/", CA_BUNDLE, "etc/hosts", "etc/hostname", "etc/resolv.conf")
_BENEATH = kernel.RESOLVE_IN_ROOT | kernel.RESOLVE_NO_MAGICLINKS | kernel.RESOLVE_NO_XDEV
_READING = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_CERTIFICATES = "etc/ssl/certs"


@dataclass(frozen=True)
class Joint:
    """How a file is joined.

    ``lines``: ours, then the image's, which thereby wins.  ``certificates``: the image's, then
    those of ours it lacks.  ``place``: ours where the image's file has :data:`PLACE`, or names
    them itself; an image whose file does neither wants its own alone.  ``only_over``: as lines,
    where the image has such a file; for a package's own configuration, which dpkg must not find
    there before it is installed.  ``only_alone``: where it has none.
    """

    path: str
    how: Literal["lines", "certificates", "place", "only_over", "only_alone"] = "lines"


JOINED: tuple[Joint, ...] = (
    Joint(CA_BUNDLE, "certificates"),
    Joint("etc/hosts"),
    Joint("etc/environment"),
    Joint("etc/npmrc"),
    Joint("usr/local/etc/npmrc"),
    Joint("etc/gitconfig"),
    Joint("etc/wgetrc", "only_over"),
    Joint("etc/apt/sources.list", "place"),
    Joint(".yarnrc.yml", "only_alone"),
    Joint("root/.gnupg/dirmngr.conf", "only_alone"),
)
_HOW = {joint.path: joint.how for joint in JOINED}


class Unreadable(Exception):  # noqa: N818 - what was found, not a mistake
    """An image has something at a path that is no file of a bounded size below its root."""


# Joining ----------------------------------------------------------------------------------


@contextmanager
def looking_into(image: Path) -> Iterator[ImageFiles]:
    """An image's tree, to read single files of.  Raises OSError."""
    with open_directory(image) as root:
        yield ImageFiles(root)


@dataclass(frozen=True)
class ImageFiles:
    """Single files and directories of an image, by its root's descriptor."""

    root: int

    def read(self, path: str) -> bytes | None:
        """A file's content, links followed within the image; None if nothing is there.

        Raises :class:`Unreadable`.
        """
        try:
            found = kernel.openat2(path, os.O_PATH, dir_fd=self.root, resolve=_BENEATH)
        except OSError as error:
            if error.errno == errno.ENOENT and not self._is_there(path):
                return None
            raise Unreadable from error
        try:
            what = os.fstat(found)
            if not stat.S_ISREG(what.st_mode) or what.st_size > MAX_BYTES:
                raise Unreadable
            # By the descriptor: it is the very file that was looked at.
            return Path(f"/proc/self/fd/{found}").read_bytes()
        finally:
            os.close(found)

    def _is_there(self, path: str) -> bool:
        flags = os.O_PATH | os.O_NOFOLLOW
        try:
            os.close(kernel.openat2(path, flags, dir_fd=self.root, resolve=_BENEATH))
        except OSError as error:
            return error.errno not in (errno.ENOENT, errno.ENOTDIR)
        return True

    def directory(self, path: str) -> os.stat_result | None:
        """The directory at a path, no link followed; None if there is nothing.

        Raises :class:`Unreadable` where it, or one above it, is something else.
        """
        how = kernel.RESOLVE_BENEATH | kernel.RESOLVE_NO_SYMLINKS | kernel.RESOLVE_NO_XDEV
        flags = os.O_PATH | os.O_DIRECTORY
        try:
            found = kernel.openat2(path, flags, dir_fd=self.root, resolve=how)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise Unreadable from error
        try:
            return os.fstat(found)
        finally:
            os.close(found)


def is_joined(path: str) -> bool:
    """Whether the image's own file at a path shows through ours."""
    return path in _HOW


def joined(path: str, ours: bytes, image: ImageFiles) -> bytes | None:
    """What a container sees at a path we lend ``ours`` at; None where that is the image's alone."""
    how = _HOW.get(path)
    try:
        image.directory(os.path.dirname(path) or ".")  # noqa: PTH120 - no path of this host
        theirs = image.read(path) if how is not None else None
    except Unreadable:
        if not path.startswith(_ESSENTIAL):
            return None
        theirs = None
    if how is None:
        return ours
    return _WAYS[how](theirs, ours)


def _marked(ours: bytes) -> bytes:
    return b"\n".join((BEGIN, ours.rstrip(b"\n"), END, b""))


def _join_lines(theirs: bytes | None, ours: bytes) -> bytes:
    return _marked(ours) + (theirs or b"")


def _join_certificates(theirs: bytes | None, ours: bytes) -> bytes:
    known = certificates(theirs or b"")
    more = [text for key, text in certificates(ours).items() if key not in known]
    if not more:
        return theirs or b""
    return _ended(theirs or b"") + _marked(b"\n".join(more))


def _join_at_place(theirs: bytes | None, ours: bytes) -> bytes | None:
    if theirs is None:
        return _marked(ours)
    if PLACE in theirs:
        return theirs.replace(PLACE + b"\n", _marked(ours), 1)
    # A base, or an image made before there was such a mark, has them in full.
    known = {source for line in ours.splitlines() for source in _sources(line)}
    lines = theirs.splitlines(keepends=True)
    own = [line for line in lines if not (found := _sources(line)) or not found <= known]
    return None if own == lines else _marked(ours) + b"".join(own)


def _sources(line: bytes) -> set[tuple[bytes, bytes, bytes]]:
    """The (site, suite, component) of a one-line entry of sources.list(5) without options."""
    kind, *rest = line.split() or [b""]
    if kind != b"deb" or len(rest) < 3 or rest[0].startswith(b"["):
        return set()
    site = rest[0].partition(b"://")[2].rstrip(b"/")
    return {(site, rest[1], component) for component in rest[2:]}


_WAYS: dict[str, Callable[[bytes | None, bytes], bytes | None]] = {
    "lines": _join_lines,
    "certificates": _join_certificates,
    "place": _join_at_place,
    "only_over": lambda theirs, ours: None if theirs is None else _join_lines(theirs, ours),
    "only_alone": lambda theirs, ours: ours if theirs is None else None,
}


def _ended(text: bytes) -> bytes:
    return text if not text or text.endswith(b"\n") else text + b"\n"


# Taking back ------------------------------------------------------------------------------


def take_back(tree: Path, base: Path, lent: Path) -> int:
    """Take our lines out of the joined files of a captured ``tree``; return how many files.

    ``lent`` is the joined layer that was over ``base``.  A file of ``tree`` may be one inode with
    ``base``'s: it is replaced, never written to.
    """
    count = 0
    with open_directory(tree) as root, open_directory(lent) as ours, open_directory(base) as below:
        private = _private_authorities(root, ours)
        for joint in JOINED:
            folder, _, name = joint.path.rpartition("/")
            with (
                _inner(root, folder) as there,
                _inner(ours, folder) as lender,
                _inner(below, folder) as base_folder,
            ):
                if there is not None and lender is not None:
                    count += _take_back(joint, name, there, lender, base_folder, private)
        with _inner(root, _CERTIFICATES) as directory:
            if directory is not None and private:
                _remove_links(directory, frozenset(private))
    return count


def _take_back(
    joint: Joint,
    name: str,
    tree: int,
    lent: int,
    base: int | None,
    private: dict[str, bytes],
) -> int:
    found, ours = _content(name, tree), _content(name, lent)
    theirs = _content(name, base) if base is not None else None
    if found is None or ours is None or found == theirs:
        return 0
    if BEGIN in found and END in found:
        left = _without_marked(found, _lines_of(ours), joint.how)
    elif joint.how == "certificates":
        unwanted = (key for text in private.values() for key in certificates(text))
        left = without_certificates(found, unwanted)
    elif joint.how == "place":
        # Without the marks it was written anew, and says all it is to say.
        left = found
    else:
        left = _without_lines(found, _lines_of(ours), theirs or b"")
    if left == found:
        return 0
    if not left.strip() and theirs is None:
        os.unlink(name, dir_fd=tree)
    elif left == theirs and base is not None:
        os.unlink(name, dir_fd=tree)
        os.link(name, name, src_dir_fd=base, dst_dir_fd=tree, follow_symlinks=False)
    else:
        _replace(name, tree, left)
    return 1


def _lines_of(ours: bytes) -> list[bytes]:
    """Our lines in a joined file."""
    inside = ours.partition(BEGIN + b"\n")[2].rpartition(b"\n" + END)[0]
    return inside.splitlines() if BEGIN in ours else ours.splitlines()


def _without_marked(found: bytes, ours: Sequence[bytes], how: str) -> bytes:
    """A file without the marks and what of ours is between them; a line that was changed stays."""
    before, _, rest = found.partition(BEGIN + b"\n")
    inside, _, after = rest.partition(END)
    lines, known = inside.splitlines(keepends=True), frozenset(ours)
    changed = [line for line in lines if line.rstrip(b"\n") not in known]
    if changed:
        # A section's head stays with what was written under it (git-config(1)).
        lines = [line for line in lines if line in changed or line.startswith(b"[")]
    else:
        lines = [PLACE + b"\n"] if how == "place" and inside else []
    return before + b"".join(lines) + after.removeprefix(b"\n")


def _without_lines(found: bytes, ours: Sequence[bytes], theirs: bytes) -> bytes:
    """A file without lines that are ours alone: its comments are gone, as npm writes it anew."""
    kept = {_plain(line) for line in theirs.splitlines()}
    known = {_plain(line) for line in ours} - kept - {b""}
    return b"".join(line for line in found.splitlines(keepends=True) if _plain(line) not in known)


def _plain(line: bytes) -> bytes:
    return b"".join(line.split())


def _private_authorities(tree: int, lent: int) -> dict[str, bytes]:
    """The host's own authorities that the image was lent, by the names of their files."""
    found: dict[str, bytes] = {}
    with _inner(lent, LOCAL_CAS) as ours, _inner(tree, LOCAL_CAS) as theirs:
        if ours is not None:
            for entry in list_entries(ours):
                if theirs is None or _content(entry.name, theirs) is None:
                    found[entry.name] = _content(entry.name, ours) or b""
    return found


def _remove_links(directory: int, names: frozenset[str]) -> None:
    """Remove the links that update-ca-certificates(8) made to files that are no more there."""
    gone = {f"/{LOCAL_CAS}/{name}" for name in names}
    links: dict[str, str] = {}
    for entry in list_entries(directory):
        if entry.is_symlink():
            links[entry.name] = os.readlink(entry.name, dir_fd=directory)
    direct = {name for name, target in links.items() if target in gone}
    by_hash = {name for name, target in links.items() if target in direct}
    for name in direct | by_hash:
        os.unlink(name, dir_fd=directory)


@contextmanager
def _inner(root: int, path: str) -> Iterator[int | None]:
    """A directory below ``root``, no link followed; None where there is none."""
    with contextlib.ExitStack() as stack:
        found: int | None = root
        for part in path.split("/") if path else ():
            if found is not None:
                found = stack.enter_context(open_if_directory(part, found))
        yield found


def _content(name: str, directory: int) -> bytes | None:
    """What is in a regular file of a bounded size; None for anything else, or nothing.

    A build's container may be at work on it: it can become a pipe after it was looked at, which
    is not to be waited for, or grow while it is read.
    """
    try:
        if not stat.S_ISREG(lstat(name, directory).st_mode):
            return None
        found = os.open(name, _READING, dir_fd=directory)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ELOOP, errno.ENXIO):
            return None
        raise
    with open(found, "rb") as file:  # noqa: PTH123 - a descriptor
        if not stat.S_ISREG(os.fstat(found).st_mode):
            return None
        data = file.read(2 * MAX_BYTES + 1)
    return data if len(data) <= 2 * MAX_BYTES else None


def _replace(name: str, directory: int, data: bytes) -> None:
    found, temporary = lstat(name, directory), f".orkestr-joined-{token_hex(8)}"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        with open(os.open(temporary, flags, 0o600, dir_fd=directory), "wb") as file:  # noqa: PTH123
            file.write(data)
            file.flush()
            os.fchown(file.fileno(), found.st_uid, found.st_gid)
            os.fchmod(file.fileno(), stat.S_IMODE(found.st_mode))
            os.utime(file.fileno(), ns=(found.st_atime_ns, found.st_mtime_ns))
    except OSError:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary, dir_fd=directory)
        raise
    os.rename(temporary, name, src_dir_fd=directory, dst_dir_fd=directory)


# Lending again ---------------------------------------------------------------------------


def lend_again(upper: Path, lent: Path, before: Sequence[Path]) -> int:
    """Have what is between the marks in a saved disk's files be what is lent now; how many files.

    A snapshot may have been taken on another network.  ``before`` are the trees of which ours may
    have come then; lines that are in none of them are the sandbox's own.
    """
    count = 0
    with open_directory(upper) as root, open_directory(lent) as ours:
        for joint in JOINED:
            folder, _, name = joint.path.rpartition("/")
            with _inner(root, folder) as there, _inner(ours, folder) as lender:
                found = _content(name, there) if there is not None else None
                if there is None or found is None or BEGIN not in found or END not in found:
                    continue
                now = _content(name, lender) if lender is not None else None
                known = [line for tree in before for line in _lines_in(tree, joint.path)]
                fresh = _renewed(found, now or b"", known, joint.how)
                if fresh != found:
                    _replace(name, there, fresh)
                    count += 1
    return count


def _renewed(found: bytes, now: bytes, known: Sequence[bytes], how: str) -> bytes:
    left = _without_marked(found, known, how)
    if BEGIN not in now:
        return left
    ours = _marked(b"\n".join(_lines_of(now)))
    if how == "place":
        return left.replace(PLACE + b"\n", ours, 1)
    return _ended(left) + ours if how == "certificates" else ours + left


def _lines_in(tree: Path, path: str) -> list[bytes]:
    with open_directory(tree) as root, _inner(root, path.rpartition("/")[0]) as directory:
        found = _content(path.rpartition("/")[2], directory) if directory is not None else None
    return _lines_of(found or b"")


# What stays behind ------------------------------------------------------------------------


class Unkept:
    """Tells once of each file that a step writes and no sandbox will see.  For one build."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[int, int]] = {}

    def after_step(self, upper: Path, lent: Path) -> list[str]:
        """The paths (absolute, as inside) that were written since this was last asked."""
        found: list[str] = []
        with open_directory(upper) as root, open_directory(lent) as ours:
            for path in _files(ours):
                folder, _, name = path.rpartition("/")
                with _inner(root, folder) as there, _inner(ours, folder) as lender:
                    assert lender is not None
                    if there is not None and self._is_news(path, name, there, lender):
                        found.append(f"/{path}")
        return found

    def _is_news(self, path: str, name: str, there: int, lender: int) -> bool:
        try:
            what = lstat(name, there)
        except FileNotFoundError:
            self._known.pop(path, None)
            return False
        mark = (what.st_ino, what.st_mtime_ns)
        if self._known.get(path) == mark:
            return False
        self._known[path] = mark
        # A whiteout: it was removed, and will be there again.
        removed = stat.S_ISCHR(what.st_mode)
        return removed or (not is_joined(path) and _content(name, there) != _content(name, lender))


def _files(directory: int, above: str = "") -> Iterator[str]:
    for entry in list_entries(directory):
        if entry.is_dir(follow_symlinks=False):
            with open_directory(entry.name, directory) as inner:
                yield from _files(inner, f"{above}{entry.name}/")
        else:
            yield above + entry.name

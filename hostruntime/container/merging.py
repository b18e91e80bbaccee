"""Merging the host's files with an image's files of the same names, and separating them again.

The runtime layer lies over the image and would hide the image's files of the same names.  So it is
merged with each image first: :data:`MERGE_RULES` says which files combine the image's lines with
ours, ours between two markers.  A step that changes such a file thereby copies our lines into the
writable layer too; :func:`strip_host_parts` removes them from what was captured.

Images are untrusted.  Their files are opened below the image's root, never through a link out of
it, and read only if they are regular and of limited size (openat2(2)).  If one cannot be read, we
provide no file of ours there, except those that a container cannot work without.
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
from hostruntime.container.host_files import CA_BUNDLE, LOCAL_CAS
from hostruntime.host import kernel
from hostruntime.image.trees import list_entries, lstat, open_directory, open_if_directory

BEGIN_MARKER = b"# orkestr: lent to this container, not part of its image: begin"
END_MARKER = b"# orkestr: end"
# Replaces our lines in a captured image's file: marks where they belong.
PLACEHOLDER = b"# orkestr: the lines of the host it runs on come here"
MAX_BYTES = 4 * 1024 * 1024
_REQUIRED = (".orkestr/", CA_BUNDLE, "etc/hosts", "etc/hostname", "etc/resolv.conf")
_RESOLVE_IN_IMAGE = kernel.RESOLVE_IN_ROOT | kernel.RESOLVE_NO_MAGICLINKS | kernel.RESOLVE_NO_XDEV
_READ_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_CERTIFICATES = "etc/ssl/certs"


@dataclass(frozen=True)
class MergeRule:
    """How a file is merged.

    ``lines``: ours, then the image's, which thereby take precedence.  ``certificates``: the
    image's, then those of ours that it lacks.  ``placeholder``: ours where the image's file has
    :data:`PLACEHOLDER`, or has the same lines itself; otherwise the image's file alone.
    ``if_present``: like lines, but only if the image has such a file; for a package's own
    configuration, which dpkg must not find there before it is installed.  ``if_absent``: ours, but
    only if the image has no such file.
    """

    path: str
    method: Literal["lines", "certificates", "placeholder", "if_present", "if_absent"] = "lines"


MERGE_RULES: tuple[MergeRule, ...] = (
    MergeRule(CA_BUNDLE, "certificates"),
    MergeRule("etc/hosts"),
    MergeRule("etc/environment"),
    MergeRule("etc/npmrc"),
    MergeRule("usr/local/etc/npmrc"),
    MergeRule("etc/gitconfig"),
    MergeRule("etc/wgetrc", "if_present"),
    MergeRule("etc/apt/sources.list", "placeholder"),
    MergeRule(".yarnrc.yml", "if_absent"),
    MergeRule("root/.gnupg/dirmngr.conf", "if_absent"),
)
_METHODS = {rule.path: rule.method for rule in MERGE_RULES}


class UnreadableFile(Exception):  # noqa: N818 - what was found, not a mistake
    """What an image has at a path is not a regular file of limited size below its root."""


# Merging ----------------------------------------------------------------------------------


@contextmanager
def open_image(image: Path) -> Iterator[ImageFiles]:
    """Open an image's tree to read single files.  Raises OSError."""
    with open_directory(image) as root:
        yield ImageFiles(root)


@dataclass(frozen=True)
class ImageFiles:
    """Reads single files and directories of an image, by its root's descriptor."""

    root: int

    def read(self, path: str) -> bytes | None:
        """A file's content, with links followed within the image; None if it does not exist.

        Raises :class:`UnreadableFile`.
        """
        try:
            descriptor = kernel.openat2(
                path, os.O_PATH, dir_fd=self.root, resolve=_RESOLVE_IN_IMAGE
            )
        except OSError as error:
            if error.errno == errno.ENOENT and not self._exists(path):
                return None
            raise UnreadableFile from error
        try:
            info = os.fstat(descriptor)
            if not stat.S_ISREG(info.st_mode) or info.st_size > MAX_BYTES:
                raise UnreadableFile
            # By the descriptor, so that it is the same file that was checked.
            return Path(f"/proc/self/fd/{descriptor}").read_bytes()
        finally:
            os.close(descriptor)

    def _exists(self, path: str) -> bool:
        flags = os.O_PATH | os.O_NOFOLLOW
        try:
            os.close(kernel.openat2(path, flags, dir_fd=self.root, resolve=_RESOLVE_IN_IMAGE))
        except OSError as error:
            return error.errno not in (errno.ENOENT, errno.ENOTDIR)
        return True

    def directory(self, path: str) -> os.stat_result | None:
        """The directory at a path, without following links; None if it does not exist.

        Raises :class:`UnreadableFile` if it, or a parent, is something else.
        """
        resolve = kernel.RESOLVE_BENEATH | kernel.RESOLVE_NO_SYMLINKS | kernel.RESOLVE_NO_XDEV
        flags = os.O_PATH | os.O_DIRECTORY
        try:
            descriptor = kernel.openat2(path, flags, dir_fd=self.root, resolve=resolve)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise UnreadableFile from error
        try:
            return os.fstat(descriptor)
        finally:
            os.close(descriptor)


def is_merged(path: str) -> bool:
    """Whether the image's own file at a path is merged with ours."""
    return path in _METHODS


def merge(path: str, ours: bytes, image: ImageFiles) -> bytes | None:
    """The content a container sees at a path where we provide ``ours``; None: the image's alone."""
    method = _METHODS.get(path)
    try:
        image.directory(os.path.dirname(path) or ".")  # noqa: PTH120 - no path of this host
        theirs = image.read(path) if method is not None else None
    except UnreadableFile:
        if not path.startswith(_REQUIRED):
            return None
        theirs = None
    if method is None:
        return ours
    return _MERGE_FUNCTIONS[method](theirs, ours)


def _with_markers(ours: bytes) -> bytes:
    return b"\n".join((BEGIN_MARKER, ours.rstrip(b"\n"), END_MARKER, b""))


def _merge_lines(theirs: bytes | None, ours: bytes) -> bytes:
    return _with_markers(ours) + (theirs or b"")


def _merge_certificates(theirs: bytes | None, ours: bytes) -> bytes:
    known = certificates(theirs or b"")
    more = [text for key, text in certificates(ours).items() if key not in known]
    if not more:
        return theirs or b""
    return _ensure_newline(theirs or b"") + _with_markers(b"\n".join(more))


def _merge_at_placeholder(theirs: bytes | None, ours: bytes) -> bytes | None:
    if theirs is None:
        return _with_markers(ours)
    if PLACEHOLDER in theirs:
        return theirs.replace(PLACEHOLDER + b"\n", _with_markers(ours), 1)
    # A base, or an image created before the placeholder existed, has the lines themselves.
    our_sources = {source for line in ours.splitlines() for source in _sources(line)}
    lines = theirs.splitlines(keepends=True)
    image_lines = [
        line for line in lines if not (sources := _sources(line)) or not sources <= our_sources
    ]
    return None if image_lines == lines else _with_markers(ours) + b"".join(image_lines)


def _sources(line: bytes) -> set[tuple[bytes, bytes, bytes]]:
    """The (site, suite, component) of a one-line entry of sources.list(5) without options."""
    kind, *rest = line.split() or [b""]
    if kind != b"deb" or len(rest) < 3 or rest[0].startswith(b"["):
        return set()
    site = rest[0].partition(b"://")[2].rstrip(b"/")
    return {(site, rest[1], component) for component in rest[2:]}


_MERGE_FUNCTIONS: dict[str, Callable[[bytes | None, bytes], bytes | None]] = {
    "lines": _merge_lines,
    "certificates": _merge_certificates,
    "placeholder": _merge_at_placeholder,
    "if_present": lambda theirs, ours: None if theirs is None else _merge_lines(theirs, ours),
    "if_absent": lambda theirs, ours: ours if theirs is None else None,
}


def _ensure_newline(text: bytes) -> bytes:
    return text if not text or text.endswith(b"\n") else text + b"\n"


# Separating -------------------------------------------------------------------------------


def strip_host_parts(tree: Path, base: Path, layer: Path) -> int:
    """Remove our lines from the merged files of a captured ``tree``; return how many files.

    ``layer`` is the merged layer that was over ``base``.  A file of ``tree`` may share its inode
    with ``base``'s: it is replaced, never written to.
    """
    count = 0
    with (
        open_directory(tree) as root,
        open_directory(layer) as layer_root,
        open_directory(base) as base_root,
    ):
        private = _private_authorities(root, layer_root)
        for rule in MERGE_RULES:
            folder, _, name = rule.path.rpartition("/")
            with (
                _open_subdirectory(root, folder) as target_dir,
                _open_subdirectory(layer_root, folder) as layer_dir,
                _open_subdirectory(base_root, folder) as base_dir,
            ):
                if target_dir is not None and layer_dir is not None:
                    count += _strip_file(rule, name, target_dir, layer_dir, base_dir, private)
        with _open_subdirectory(root, _CERTIFICATES) as directory:
            if directory is not None and private:
                _remove_links(directory, frozenset(private))
    return count


def _strip_file(
    rule: MergeRule,
    name: str,
    tree: int,
    layer: int,
    base: int | None,
    private: dict[str, bytes],
) -> int:
    content, ours = _read_regular_file(name, tree), _read_regular_file(name, layer)
    theirs = _read_regular_file(name, base) if base is not None else None
    if content is None or ours is None or content == theirs:
        return 0
    if BEGIN_MARKER in content and END_MARKER in content:
        stripped = _strip_marked_part(content, _host_lines(ours), rule.method)
    elif rule.method == "certificates":
        unwanted = (key for text in private.values() for key in certificates(text))
        stripped = without_certificates(content, unwanted)
    elif rule.method == "placeholder":
        # Without the markers it was rewritten by the build, and is complete as it is.
        stripped = content
    else:
        stripped = _strip_lines(content, _host_lines(ours), theirs or b"")
    if stripped == content:
        return 0
    if not stripped.strip() and theirs is None:
        os.unlink(name, dir_fd=tree)
    elif stripped == theirs and base is not None:
        os.unlink(name, dir_fd=tree)
        os.link(name, name, src_dir_fd=base, dst_dir_fd=tree, follow_symlinks=False)
    else:
        _replace(name, tree, stripped)
    return 1


def _host_lines(ours: bytes) -> list[bytes]:
    """Our lines in a merged file."""
    inside = ours.partition(BEGIN_MARKER + b"\n")[2].rpartition(b"\n" + END_MARKER)[0]
    return inside.splitlines() if BEGIN_MARKER in ours else ours.splitlines()


def _strip_marked_part(content: bytes, ours: Sequence[bytes], method: str) -> bytes:
    """Remove the markers and our lines between them; a line that was changed stays."""
    before, _, rest = content.partition(BEGIN_MARKER + b"\n")
    inside, _, after = rest.partition(END_MARKER)
    lines, host_lines = inside.splitlines(keepends=True), frozenset(ours)
    changed = [line for line in lines if line.rstrip(b"\n") not in host_lines]
    if changed:
        # A section header stays with what was added under it (git-config(1)).
        lines = [line for line in lines if line in changed or line.startswith(b"[")]
    else:
        lines = [PLACEHOLDER + b"\n"] if method == "placeholder" and inside else []
    return before + b"".join(lines) + after.removeprefix(b"\n")


def _strip_lines(content: bytes, ours: Sequence[bytes], theirs: bytes) -> bytes:
    """Remove our lines from a file whose comments are gone, as npm rewrites it."""
    image_lines = {_strip_whitespace(line) for line in theirs.splitlines()}
    host_lines = {_strip_whitespace(line) for line in ours} - image_lines - {b""}
    return b"".join(
        line
        for line in content.splitlines(keepends=True)
        if _strip_whitespace(line) not in host_lines
    )


def _strip_whitespace(line: bytes) -> bytes:
    return b"".join(line.split())


def _private_authorities(tree: int, layer: int) -> dict[str, bytes]:
    """The host's own authorities that the layer provided to the image, by file name."""
    private: dict[str, bytes] = {}
    with (
        _open_subdirectory(layer, LOCAL_CAS) as ours,
        _open_subdirectory(tree, LOCAL_CAS) as theirs,
    ):
        if ours is not None:
            for entry in list_entries(ours):
                if theirs is None or _read_regular_file(entry.name, theirs) is None:
                    private[entry.name] = _read_regular_file(entry.name, ours) or b""
    return private


def _remove_links(directory: int, names: frozenset[str]) -> None:
    """Remove the links that update-ca-certificates(8) created to files that no longer exist."""
    removed = {f"/{LOCAL_CAS}/{name}" for name in names}
    links: dict[str, str] = {}
    for entry in list_entries(directory):
        if entry.is_symlink():
            links[entry.name] = os.readlink(entry.name, dir_fd=directory)
    direct = {name for name, target in links.items() if target in removed}
    by_hash = {name for name, target in links.items() if target in direct}
    for name in direct | by_hash:
        os.unlink(name, dir_fd=directory)


@contextmanager
def _open_subdirectory(root: int, path: str) -> Iterator[int | None]:
    """Open a directory below ``root`` without following links; None if there is none."""
    with contextlib.ExitStack() as stack:
        current: int | None = root
        for part in path.split("/") if path else ():
            if current is not None:
                current = stack.enter_context(open_if_directory(part, current))
        yield current


def _read_regular_file(name: str, directory: int) -> bytes | None:
    """The content of a regular file of limited size; None for anything else, or if missing.

    A build's container may be modifying it: it can become a pipe after it was checked, which must
    not block us, or grow while it is read.
    """
    try:
        if not stat.S_ISREG(lstat(name, directory).st_mode):
            return None
        descriptor = os.open(name, _READ_FLAGS, dir_fd=directory)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ELOOP, errno.ENXIO):
            return None
        raise
    with open(descriptor, "rb") as file:  # noqa: PTH123 - a descriptor
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            return None
        data = file.read(2 * MAX_BYTES + 1)
    return data if len(data) <= 2 * MAX_BYTES else None


def _replace(name: str, directory: int, data: bytes) -> None:
    original, temporary = lstat(name, directory), f".orkestr-joined-{token_hex(8)}"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        with open(os.open(temporary, flags, 0o600, dir_fd=directory), "wb") as file:  # noqa: PTH123
            file.write(data)
            file.flush()
            os.fchown(file.fileno(), original.st_uid, original.st_gid)
            os.fchmod(file.fileno(), stat.S_IMODE(original.st_mode))
            os.utime(file.fileno(), ns=(original.st_atime_ns, original.st_mtime_ns))
    except OSError:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary, dir_fd=directory)
        raise
    os.rename(temporary, name, src_dir_fd=directory, dst_dir_fd=directory)


# Refreshing ------------------------------------------------------------------------------


def refresh_host_parts(upper: Path, layer: Path, earlier_layers: Sequence[Path]) -> int:
    """Replace our lines in a saved disk's files by those of ``layer``; return how many files.

    A snapshot may have been taken with another network mode.  ``earlier_layers`` are the trees that
    our lines may have come from; lines in none of them are the sandbox's own.
    """
    count = 0
    with open_directory(upper) as root, open_directory(layer) as layer_root:
        for rule in MERGE_RULES:
            folder, _, name = rule.path.rpartition("/")
            with (
                _open_subdirectory(root, folder) as target_dir,
                _open_subdirectory(layer_root, folder) as layer_dir,
            ):
                content = _read_regular_file(name, target_dir) if target_dir is not None else None
                if (
                    target_dir is None
                    or content is None
                    or BEGIN_MARKER not in content
                    or END_MARKER not in content
                ):
                    continue
                current = _read_regular_file(name, layer_dir) if layer_dir is not None else None
                known = [
                    line for tree in earlier_layers for line in _host_lines_of_tree(tree, rule.path)
                ]
                refreshed = _refresh_content(content, current or b"", known, rule.method)
                if refreshed != content:
                    _replace(name, target_dir, refreshed)
                    count += 1
    return count


def _refresh_content(content: bytes, current: bytes, known: Sequence[bytes], method: str) -> bytes:
    stripped = _strip_marked_part(content, known, method)
    if BEGIN_MARKER not in current:
        return stripped
    ours = _with_markers(b"\n".join(_host_lines(current)))
    if method == "placeholder":
        return stripped.replace(PLACEHOLDER + b"\n", ours, 1)
    return _ensure_newline(stripped) + ours if method == "certificates" else ours + stripped


def _host_lines_of_tree(tree: Path, path: str) -> list[bytes]:
    with (
        open_directory(tree) as root,
        _open_subdirectory(root, path.rpartition("/")[0]) as directory,
    ):
        content = (
            _read_regular_file(path.rpartition("/")[2], directory)
            if directory is not None
            else None
        )
    return _host_lines(content or b"")


# Writes that are lost ---------------------------------------------------------------------


class LostWrites:
    """Reports each file, once, that a step writes and no sandbox will see.  For one build."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[int, int]] = {}

    def after_step(self, upper: Path, layer: Path) -> list[str]:
        """The paths (absolute, as inside) that were written since the last call."""
        paths: list[str] = []
        with open_directory(upper) as root, open_directory(layer) as layer_root:
            for path in _files(layer_root):
                folder, _, name = path.rpartition("/")
                with (
                    _open_subdirectory(root, folder) as target_dir,
                    _open_subdirectory(layer_root, folder) as layer_dir,
                ):
                    assert layer_dir is not None
                    if target_dir is not None and self._is_new_loss(
                        path, name, target_dir, layer_dir
                    ):
                        paths.append(f"/{path}")
        return paths

    def _is_new_loss(self, path: str, name: str, target_dir: int, layer_dir: int) -> bool:
        try:
            info = lstat(name, target_dir)
        except FileNotFoundError:
            self._known.pop(path, None)
            return False
        version = (info.st_ino, info.st_mtime_ns)
        if self._known.get(path) == version:
            return False
        self._known[path] = version
        # A whiteout: the file was removed, but will be there again.
        removed = stat.S_ISCHR(info.st_mode)
        return removed or (
            not is_merged(path)
            and _read_regular_file(name, target_dir) != _read_regular_file(name, layer_dir)
        )


def _files(directory: int, prefix: str = "") -> Iterator[str]:
    for entry in list_entries(directory):
        if entry.is_dir(follow_symlinks=False):
            with open_directory(entry.name, directory) as inner:
                yield from _files(inner, f"{prefix}{entry.name}/")
        else:
            yield prefix + entry.name

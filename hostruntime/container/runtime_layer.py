"""The runtime layer: what every container sees over its image, and no image ever contains.

A small tree per network mode, mounted as the topmost lower layer, so none of it is captured.  It
provides init, the host's certificate authorities, name resolution, the proxy's address and the
package managers' configuration (:mod:`hostruntime.container.host_files`).

A mode's tree is the same for all images (`restricted-3f2a…`).  A container gets that tree merged
with its image (`restricted+91bc…`, :mod:`hostruntime.container.merging`), with the image's owners
and modes on every directory, as the topmost layer's are visible.  A tree is named after its
content, never changed, and removed once no container has it mounted.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import stat
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from hostruntime.container.authorities import java_key_store
from hostruntime.container.host_files import (
    CA_BUNDLE,
    GIT_CONFIG,
    TRUST_STORE,
    LayerFile,
    git_rewrites,
    host_files,
)
from hostruntime.container.merging import (
    ImageFiles,
    UnreadableFile,
    merge,
    open_image,
    refresh_host_parts,
)
from hostruntime.errors import HostUnavailable
from hostruntime.host.paths import StatePaths
from hostruntime.network.egress import default_domains, host_registries
from hostruntime.network.policy import DEFAULT_LIST, MODES, Policy, PolicyError
from hostruntime.network.slots import SlotPool

# A merged tree may still be about to be mounted for this long.
UNUSED_SECONDS = 3600.0
# Modes of directories that the image lacks; all others get 0755.
_DIRECTORY_MODES = {"root": 0o700, "root/.gnupg": 0o700, "etc/sudoers.d": 0o750}
_MAX_CACHED = 4096
_numbers = count()


@dataclass(frozen=True)
class _Ownership:
    """A directory's mode and owner."""

    mode: int
    uid: int = 0
    gid: int = 0


def build_runtime_layers(paths: StatePaths, pool: SlotPool) -> None:
    """Write the three layers and use them for new containers; idempotent.

    Call it while no container is starting.  Raises HostUnavailable if the host lacks init or a
    certificate bundle, OSError.
    """
    registries, domains = host_registries(paths), _default_domains(paths)
    for mode in MODES:
        files = host_files(mode, pool, registries, domains)
        name = f"{mode}-{_digest(files, {})}"
        _publish(paths, name, files, {})
        _replace_symlink(paths.runtime / mode, name)
    remove_unused(paths, unused_seconds=0)


class RuntimeTrees:
    """Finds or creates the layer of each container.  Thread-safe."""

    def __init__(self, paths: StatePaths) -> None:
        self._paths = paths
        self._lock = threading.Lock()
        self._cache: dict[tuple[object, ...], str] = {}

    def tree(self, policy: Policy, image: Path) -> Path:
        """The layer for a container on the tree ``image``; the same for equal arguments.

        Raises HostUnavailable before :func:`build_runtime_layers`, OSError.
        """
        mode_tree = _mode_tree(self._paths, policy.mode)
        status = image.stat()
        key = (mode_tree.name, policy.allow_domains, image, status.st_ino, status.st_ctime_ns)
        tree = self._paths.runtime / self._cache.get(key, "")
        if key not in self._cache or not _mark_used(tree):
            similar = self._similar_tree(policy, image) or mode_tree
            tree = _merged_tree(self._paths, policy, mode_tree, image, similar)
            with self._lock:
                if len(self._cache) >= _MAX_CACHED:
                    self._cache.clear()
                self._cache[key] = tree.name
        return tree

    def _similar_tree(self, policy: Policy, image: Path) -> Path | None:
        """A tree with almost the same files: that of the same image without custom domains.

        Every container may have its own list, while the image's part of a tree may be large.
        """
        return self.tree(Policy(policy.mode), image) if policy.allow_domains else None

    def refresh(self, policy: Policy, image: Path, upper: Path) -> None:
        """Update what the writable layer of a saved disk has of another network mode's layer.

        A disk that is too full for that stays as it is.  Raises the same as :meth:`tree`.
        """
        mode_trees = [_mode_tree(self._paths, mode) for mode in MODES]
        try:
            refresh_host_parts(upper, self.tree(policy, image), mode_trees)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise


def _default_domains(paths: StatePaths) -> list[str]:
    # The proxy reports an invalid list, and refuses to run with it.
    try:
        return default_domains(paths)
    except (PolicyError, OSError):
        return []


def _mode_tree(paths: StatePaths, mode: str) -> Path:
    link = paths.runtime / mode
    if not link.is_symlink():
        raise HostUnavailable("The runtime layers are not built; restart the host agent.")
    return paths.runtime / link.readlink()


def _mark_used(tree: Path) -> bool:
    """Whether the tree still exists; if so, it is not removed for another hour."""
    try:
        os.utime(tree)
    except FileNotFoundError:
        return False
    return True


# Merging with an image --------------------------------------------------------------------


def _merged_tree(
    paths: StatePaths, policy: Policy, mode_tree: Path, image: Path, similar: Path
) -> Path:
    with open_image(image) as image_files:
        files = [
            LayerFile(str(path.relative_to(mode_tree)), data, stat.S_IMODE(path.stat().st_mode))
            for path in sorted(mode_tree.rglob("*"))
            if path.is_file()
            and (data := merge(str(path.relative_to(mode_tree)), path.read_bytes(), image_files))
            is not None
        ]
        directories = _image_directories(image_files, files)
    files = [_add_own_domains(file, policy) for file in files]
    bundle = next(file.data for file in files if file.path == CA_BUNDLE)
    files.append(LayerFile(TRUST_STORE, java_key_store(bundle)))
    name = f"{policy.mode}+{_digest(files, directories)}"
    tree = paths.runtime / name
    if not _mark_used(tree):
        _publish(paths, name, files, directories, similar)
    return tree


def _add_own_domains(file: LayerFile, policy: Policy) -> LayerFile:
    """Add the domains of the container's own list to the file that has the default ones."""
    if file.path != GIT_CONFIG or not policy.allow_domains:
        return file
    own_domains = [domain for domain in policy.allow_domains if domain != DEFAULT_LIST]
    return LayerFile(file.path, file.data + git_rewrites(own_domains).encode(), file.mode)


def _image_directories(image: ImageFiles, files: Sequence[LayerFile]) -> dict[str, _Ownership]:
    directories: dict[str, _Ownership] = {}
    for file in files:
        for parent in Path(file.path).parents[:-1]:
            with suppress(UnreadableFile):
                if (status := image.directory(str(parent))) is not None:
                    mode = stat.S_IMODE(status.st_mode)
                    directories[str(parent)] = _Ownership(mode, status.st_uid, status.st_gid)
    return directories


# Trees on disk ----------------------------------------------------------------------------


def _publish(
    paths: StatePaths,
    name: str,
    files: Sequence[LayerFile],
    directories: Mapping[str, _Ownership],
    similar: Path | None = None,
) -> None:
    """Create the tree ``name`` if it does not exist; link files that ``similar`` has as well."""
    tree = paths.runtime / name
    if tree.is_dir():
        return
    temporary = paths.runtime / f".{name}.{os.getpid()}-{next(_numbers)}.making"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        _create_directory(temporary, _Ownership(0o755))
        # A mount point, so that LXC does not create one in the writable layer.
        _create_directory(temporary / "workspace", _Ownership(0o755))
        for file in files:
            _write(temporary, file, directories, similar)
        temporary.rename(tree)
    except OSError:
        # Another start may have published it first.
        shutil.rmtree(temporary, ignore_errors=True)
        if not tree.is_dir():
            raise


def _digest(files: Sequence[LayerFile], directories: Mapping[str, _Ownership]) -> str:
    digest = hashlib.sha256()
    for file in sorted(files, key=lambda file: file.path):
        header = f"{file.path}\0{file.mode:o}\0{len(file.data)}\0"
        digest.update(header.encode() + file.data)
    for path, ownership in sorted(directories.items()):
        digest.update(f"{path}\0{ownership.mode:o}\0{ownership.uid}\0{ownership.gid}\0".encode())
    # The content is untrusted: nobody may be able to construct a collision.
    return digest.hexdigest()[:32]


def _write(
    root: Path, file: LayerFile, directories: Mapping[str, _Ownership], similar: Path | None
) -> None:
    target = root / file.path
    for parent in reversed(target.relative_to(root).parents[:-1]):
        default = _Ownership(_DIRECTORY_MODES.get(str(parent), 0o755))
        _create_directory(root / parent, directories.get(str(parent), default))
    existing = similar / file.path if similar is not None else None
    if existing is None or not existing.is_file() or existing.read_bytes() != file.data:
        existing = None
    if existing is None or not _try_link(existing, target):
        target.write_bytes(file.data)
        target.chmod(file.mode)


def _try_link(existing: Path, target: Path) -> bool:
    """Link a file; False if the file system's limit of links is reached (65,000 on ext4)."""
    try:
        os.link(existing, target)
    except OSError as error:
        if error.errno != errno.EMLINK:
            raise
        return False
    return True


def _create_directory(path: Path, ownership: _Ownership) -> None:
    path.mkdir(exist_ok=True)
    os.chown(path, ownership.uid, ownership.gid)
    path.chmod(ownership.mode)


def _replace_symlink(link: Path, name: str) -> None:
    """Atomically make a symbolic link point to ``name``."""
    temporary = link.with_name(f".{link.name}.new")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(name)
    temporary.rename(link)


def remove_unused(paths: StatePaths, unused_seconds: float = UNUSED_SECONDS) -> None:
    """Remove trees that are not mounted and have not been used recently.  Raises OSError."""
    current = {_mode_tree(paths, mode) for mode in MODES}
    cutoff = time.time() - unused_seconds
    mounted = _mounted_roots()
    for path in paths.runtime.iterdir():
        in_use = path in current or path.is_symlink() or path.stat().st_mtime > cutoff
        if not in_use and not any(root.endswith(f"/{path.name}") for root in mounted):
            # Rename it first: a container that starts meanwhile must get all of it or none.
            doomed = path.with_name(f".{path.name}.{next(_numbers)}.going")
            path.rename(doomed)
            shutil.rmtree(doomed)


def _mounted_roots() -> list[str]:
    """Return the source directory of every mount (the fourth field of mountinfo, proc(5))."""
    lines = Path("/proc/self/mountinfo").read_text(errors="replace").splitlines()
    return [line.split(" ")[3] for line in lines]

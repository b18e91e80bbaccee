"""The runtime layer: what every container sees over its image, and no image ever contains.

A small tree per network mode, mounted as the topmost lower layer, so nothing of it is captured.
It brings init, the host's certificate authorities, name resolution, the proxy's address and the
package managers' configuration (:mod:`hostruntime.container.lent_files`).

A mode's tree is the same for all images (`restricted-3f2a…`).  What a container gets is that one
joined with its image (`restricted+91bc…`, :mod:`hostruntime.container.joining`), with the image's
owners and modes on every directory, for the topmost layer's are those that show.  A tree is named
after its content, never changed, and removed once no container has it mounted.
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
from hostruntime.container.joining import ImageFiles, Unreadable, joined, lend_again, looking_into
from hostruntime.container.lent_files import (
    CA_BUNDLE,
    GIT_CONFIG,
    TRUST_STORE,
    LayerFile,
    git_rewrites,
    lent_files,
)
from hostruntime.errors import HostUnavailable
from hostruntime.host.paths import StatePaths
from hostruntime.network.egress import default_domains, host_registries
from hostruntime.network.policy import DEFAULT_LIST, MODES, Policy, PolicyError
from hostruntime.network.slots import SlotPool

# A joined tree may be about to be mounted for so long.
UNUSED_SECONDS = 3600.0
# What a directory is made as where the image has none; all others as Debian has most of them.
_DIRECTORY_MODES = {"root": 0o700, "root/.gnupg": 0o700, "etc/sudoers.d": 0o750}
_REMEMBERED = 4096
_numbers = count()


@dataclass(frozen=True)
class _Owned:
    """Whose a directory is."""

    mode: int
    uid: int = 0
    gid: int = 0


def build_runtime_layers(paths: StatePaths, pool: SlotPool) -> None:
    """Write the three layers and make them the ones new containers get; idempotent.

    For when no container is about to start.  Raises HostUnavailable when the host lacks init or
    a certificate bundle, OSError.
    """
    registries, domains = host_registries(paths), _default_domains(paths)
    for mode in MODES:
        files = lent_files(mode, pool, registries, domains)
        name = f"{mode}-{_digest(files, {})}"
        _publish(paths, name, files, {})
        _point(paths.runtime / mode, name)
    remove_unused(paths, unused_seconds=0)


class RuntimeTrees:
    """Finds the layer of each container.  Methods may be called from any thread."""

    def __init__(self, paths: StatePaths) -> None:
        self._paths = paths
        self._lock = threading.Lock()
        self._known: dict[tuple[object, ...], str] = {}

    def tree(self, policy: Policy, image: Path) -> Path:
        """The layer for a container on the tree ``image``; the same for the same.

        Raises HostUnavailable before :func:`build_runtime_layers`, OSError.
        """
        lent = _lent_tree(self._paths, policy.mode)
        found = image.stat()
        key = (lent.name, policy.allow_domains, image, found.st_ino, found.st_ctime_ns)
        tree = self._paths.runtime / self._known.get(key, "")
        if key not in self._known or not _is_used_again(tree):
            alike = self._alike(policy, image) or lent
            tree = _joined_tree(self._paths, policy, lent, image, alike)
            with self._lock:
                if len(self._known) >= _REMEMBERED:
                    self._known.clear()
                self._known[key] = tree.name
        return tree

    def _alike(self, policy: Policy, image: Path) -> Path | None:
        """A tree with almost all of the same files: that of the same image with no own domains.

        Every container may have a list of its own, and an image's part of a tree be large.
        """
        return self.tree(Policy(policy.mode), image) if policy.allow_domains else None

    def renew(self, policy: Policy, image: Path, upper: Path) -> None:
        """Mend, in the writable layer of a saved disk, what it has of another network's layer.

        A disk that is too full for it stays as it is.  Raises as :meth:`tree`.
        """
        before = [_lent_tree(self._paths, mode) for mode in MODES]
        try:
            lend_again(upper, self.tree(policy, image), before)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise


def _default_domains(paths: StatePaths) -> list[str]:
    # What is wrong with a list is for the proxy to say, which does not run on it.
    try:
        return default_domains(paths)
    except (PolicyError, OSError):
        return []


def _lent_tree(paths: StatePaths, mode: str) -> Path:
    link = paths.runtime / mode
    if not link.is_symlink():
        raise HostUnavailable("The runtime layers are not built; restart the host agent.")
    return paths.runtime / link.readlink()


def _is_used_again(tree: Path) -> bool:
    """Whether it is still there; from now on it is not removed for an hour."""
    try:
        os.utime(tree)
    except FileNotFoundError:
        return False
    return True


# Joining with an image --------------------------------------------------------------------


def _joined_tree(paths: StatePaths, policy: Policy, lent: Path, image: Path, alike: Path) -> Path:
    with looking_into(image) as looked:
        files = [
            LayerFile(str(path.relative_to(lent)), data, stat.S_IMODE(path.stat().st_mode))
            for path in sorted(lent.rglob("*"))
            if path.is_file()
            and (data := joined(str(path.relative_to(lent)), path.read_bytes(), looked)) is not None
        ]
        directories = _directories_like(looked, files)
    files = [_for_policy(file, policy) for file in files]
    bundle = next(file.data for file in files if file.path == CA_BUNDLE)
    files.append(LayerFile(TRUST_STORE, java_key_store(bundle)))
    name = f"{policy.mode}+{_digest(files, directories)}"
    tree = paths.runtime / name
    if not _is_used_again(tree):
        _publish(paths, name, files, directories, alike)
    return tree


def _for_policy(file: LayerFile, policy: Policy) -> LayerFile:
    """With the domains of the container's own list, where those of the default one are."""
    if file.path != GIT_CONFIG or not policy.allow_domains:
        return file
    own = [domain for domain in policy.allow_domains if domain != DEFAULT_LIST]
    return LayerFile(file.path, file.data + git_rewrites(own).encode(), file.mode)


def _directories_like(image: ImageFiles, files: Sequence[LayerFile]) -> dict[str, _Owned]:
    found: dict[str, _Owned] = {}
    for file in files:
        for parent in Path(file.path).parents[:-1]:
            with suppress(Unreadable):
                if (there := image.directory(str(parent))) is not None:
                    mode = stat.S_IMODE(there.st_mode)
                    found[str(parent)] = _Owned(mode, there.st_uid, there.st_gid)
    return found


# Trees on disk ----------------------------------------------------------------------------


def _publish(
    paths: StatePaths,
    name: str,
    files: Sequence[LayerFile],
    directories: Mapping[str, _Owned],
    alike: Path | None = None,
) -> None:
    """Make the tree of that name, if there is none; files as in ``alike`` are linked from there."""
    tree = paths.runtime / name
    if tree.is_dir():
        return
    making = paths.runtime / f".{name}.{os.getpid()}-{next(_numbers)}.making"
    shutil.rmtree(making, ignore_errors=True)
    try:
        _directory(making, _Owned(0o755))
        # A place to mount on, so that LXC makes none in the writable layer.
        _directory(making / "workspace", _Owned(0o755))
        for file in files:
            _write(making, file, directories, alike)
        making.rename(tree)
    except OSError:
        # Another start may have been quicker.
        shutil.rmtree(making, ignore_errors=True)
        if not tree.is_dir():
            raise


def _digest(files: Sequence[LayerFile], directories: Mapping[str, _Owned]) -> str:
    digest = hashlib.sha256()
    for file in sorted(files, key=lambda file: file.path):
        head = f"{file.path}\0{file.mode:o}\0{len(file.data)}\0"
        digest.update(head.encode() + file.data)
    for path, owned in sorted(directories.items()):
        digest.update(f"{path}\0{owned.mode:o}\0{owned.uid}\0{owned.gid}\0".encode())
    # Of what strangers wrote: none may be made to look like another's.
    return digest.hexdigest()[:32]


def _write(
    root: Path, file: LayerFile, directories: Mapping[str, _Owned], alike: Path | None
) -> None:
    target = root / file.path
    for parent in reversed(target.relative_to(root).parents[:-1]):
        usual = _Owned(_DIRECTORY_MODES.get(str(parent), 0o755))
        _directory(root / parent, directories.get(str(parent), usual))
    same = alike / file.path if alike is not None else None
    if same is None or not same.is_file() or same.read_bytes() != file.data:
        same = None
    if same is None or not _linked(same, target):
        target.write_bytes(file.data)
        target.chmod(file.mode)


def _linked(same: Path, target: Path) -> bool:
    """Link a file; False if the file system allows it no more names (65,000 on ext4)."""
    try:
        os.link(same, target)
    except OSError as error:
        if error.errno != errno.EMLINK:
            raise
        return False
    return True


def _directory(path: Path, owned: _Owned) -> None:
    path.mkdir(exist_ok=True)
    os.chown(path, owned.uid, owned.gid)
    path.chmod(owned.mode)


def _point(link: Path, name: str) -> None:
    """Make a symbolic link point elsewhere without a moment in which it is gone."""
    fresh = link.with_name(f".{link.name}.new")
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(name)
    fresh.rename(link)


def remove_unused(paths: StatePaths, unused_seconds: float = UNUSED_SECONDS) -> None:
    """Remove the trees that no container has mounted, nor got for so long.  Raises OSError."""
    current = {_lent_tree(paths, mode) for mode in MODES}
    before = time.time() - unused_seconds
    mounted = _mounted_roots()
    for path in paths.runtime.iterdir():
        kept = path in current or path.is_symlink() or path.stat().st_mtime > before
        if not kept and not any(root.endswith(f"/{path.name}") for root in mounted):
            # At once: a container that begins meanwhile is to have all of it or none.
            going = path.with_name(f".{path.name}.{next(_numbers)}.going")
            path.rename(going)
            shutil.rmtree(going)


def _mounted_roots() -> list[str]:
    """Return the source directory of every mount (the fourth field of mountinfo, proc(5))."""
    lines = Path("/proc/self/mountinfo").read_text(errors="replace").splitlines()
    return [line.split(" ")[3] for line in lines]

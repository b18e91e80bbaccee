"""Volumes in a backup: a copy of each as of one instant, kept in the backup itself.

::

    DIRECTORY/<backup>/volumes/<id>.ext4    sparse; shared with the backup before, if the same

What is on a volume changes while the console runs.  So the agent makes a copy on the host's own
disk, which takes a moment, and that is what is taken away.  If no agent runs and no sandbox has the
volume, it is copied from where it is.

A volume's digest is of its blocks that are not all zeros, with their numbers: which of the others
are holes depends on the file system.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from pydantic import ConfigDict

from hostruntime.client.host_client import HostClient
from hostruntime.errors import HostError, HostUnavailable, VolumeMissing
from hostruntime.host import kernel
from hostruntime.host.paths import StatePaths
from hostruntime.host.records import STRICT
from hostruntime.image.sparse import data_extents
from hostruntime.image.trees import Check, no_check
from hostruntime.volume.store import copy_sparse, locked

VOLUMES = "volumes"
_BLOCK = 64 * 1024
_ZEROS = bytes(_BLOCK)


@dataclass(frozen=True)
class StoredVolume:
    """One volume of a backup, and its digest."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    name: str
    digest: str

    @property
    def file(self) -> str:
        """The name of its file, there and in the state."""
        return f"{self.name}.ext4"


@dataclass
class TakenVolumes:
    """What :func:`take` did.  ``lost`` says what could not be had, and why."""

    stored: list[StoredVolume] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)


def take(
    paths: StatePaths,
    socket: Path,
    names: Collection[str],
    backup: Path,
    earlier: Mapping[StoredVolume, Path],
    check: Check = no_check,
) -> TakenVolumes:
    """Copy these volumes into a backup; share those that are as in an ``earlier`` one.

    Raises OSError (of the backup's disk), and what ``check`` does.
    """
    taken = TakenVolumes()
    if names:
        (backup / VOLUMES).mkdir(mode=0o700)
    with HostClient(socket) as agent:
        for name in sorted(names):
            target = backup / VOLUMES / f"{name}.ext4"
            try:
                _copy(paths, agent, name, target, check)
            except HostError as error:
                taken.lost.append(f"the volume {name} ({error.detail})")
                target.unlink(missing_ok=True)
                continue
            stored = StoredVolume(name, _digest(target, check))
            if (same := earlier.get(stored)) is not None:
                target.unlink()
                os.link(same, target)
            taken.stored.append(stored)
    return taken


def _copy(paths: StatePaths, agent: HostClient, name: str, target: Path, check: Check) -> None:
    """Copy one volume to a new file.  Raises HostError (it cannot be had), OSError."""
    image, copy = paths.volumes / f"{name}.ext4", paths.volumes / f".{name}.copy"
    try:
        agent.copy_volume(name)
    except HostUnavailable:
        if not image.exists():
            raise VolumeMissing("Its data is gone from the disk.") from None
        with locked(image):
            copy_sparse(image, target, check)
        return
    try:
        copy_sparse(copy, target, check)
    except FileNotFoundError:
        # Deleted meanwhile, or by an agent that was started meanwhile: others are still taken.
        raise VolumeMissing("Its copy is gone; it or the agent was just removed.") from None
    finally:
        copy.unlink(missing_ok=True)


def damaged(backup: Path, stored: Iterable[StoredVolume], check: Check = no_check) -> list[str]:
    """Which of a backup's volumes are not what was put there, as paths with the reason."""
    found = []
    for one in stored:
        path = f"{backup.name}/{VOLUMES}/{one.file}"
        try:
            if _digest(backup / VOLUMES / one.file, check) != one.digest:
                found.append(f"{path}: it is not what was put there")
        except FileNotFoundError:
            found.append(f"{path}: it is not there")
        except OSError as error:
            found.append(f"{path}: it cannot be read ({error.strerror})")
    return found


def restore(
    backup: Path, stored: Iterable[StoredVolume], paths: StatePaths, check: Check = no_check
) -> None:
    """Put a backup's volumes into a state directory that has none of them.  Raises OSError."""
    for one in stored:
        copy_sparse(backup / VOLUMES / one.file, paths.volumes / one.file, check)
    kernel.syncfs(paths.volumes)


def _digest(path: Path, check: Check) -> str:
    """The digest of a volume's file.  Raises OSError, and what ``check`` does."""
    summed = hashlib.sha256()
    with path.open("rb") as file:
        summed.update(os.fstat(file.fileno()).st_size.to_bytes(8))
        position = 0
        for start, end in data_extents(file.fileno()):
            # Extents may begin anywhere, and two of them in one block.
            position = max(position, start // _BLOCK * _BLOCK)
            while position < end:
                check()
                block = os.pread(file.fileno(), _BLOCK, position)
                if block != _ZEROS[: len(block)]:
                    summed.update(position.to_bytes(8))
                    summed.update(block)
                position += _BLOCK
    return summed.hexdigest()

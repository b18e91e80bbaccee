"""Containers that are directories, and a recipe language of a few words, for tests of builds."""

from __future__ import annotations

import asyncio
import errno
import shutil
import tarfile
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from pathlib import Path
from typing import cast

from hostruntime.container.exec import Chunk, Exited, Frame, Started, TimedOut
from hostruntime.container.launcher import LauncherLost
from hostruntime.container.limits import Limits
from hostruntime.container.manager import ContainerManager, ContainerSpec, RunningContainer
from hostruntime.container.tmpfs import RESTORE_TMPFS, SAVE_TMPFS
from hostruntime.errors import ContainerGone, ExecKilled, HostFull
from hostruntime.image.trees import Check
from hostruntime.network.slots import Slot
from hostruntime.wire.files import Survey


class FakeContainers:
    """Understands: write, remove, say, moan, fail, fill, signal, oom, sleep, vanish, lose."""

    def __init__(self) -> None:
        self.specs: dict[str, ContainerSpec] = {}
        self.halted: set[str] = set()
        self.ran: list[str] = []
        self.environments: list[dict[str, str]] = []
        self.kills = 0
        self.surveys = 0
        self.admitted: set[str] = set()
        self.full = False
        self.disk_full = False
        self.start_seconds = 0.0

    def as_manager(self) -> ContainerManager:
        return cast("ContainerManager", self)

    async def admit(self, owner: str, limits: Limits) -> None:
        if self.disk_full:
            raise HostFull("The disk has less than 1 GiB left.")
        self.admitted.add(owner)

    def dismiss(self, owner: str) -> None:
        self.admitted.discard(owner)

    async def start(self, spec: ContainerSpec) -> RunningContainer:
        await asyncio.sleep(self.start_seconds)
        if self.full:
            raise HostFull("There is no free slot on this host; try again.")
        self.specs[spec.owner] = spec
        upper = self.layer(spec.owner)
        upper.mkdir(parents=True)
        if spec.saved_disk is not None:
            try:
                with tarfile.open(spec.saved_disk) as saved:
                    saved.extractall(upper, filter="fully_trusted")
            except tarfile.ReadError as error:
                raise OSError(errno.EUCLEAN, "Structure needs cleaning") from error
        if spec.populate is not None:
            spec.populate(upper)
        slot = Slot(0, spec.policy.mode, 0, None, None, None)
        return RunningContainer(spec.owner, spec.owner, slot, 1, time.time(), 12.34, spec)

    def layer(self, owner: str) -> Path:
        return self.specs[owner].directory / "disk" / "upper"

    def disk_used(self, owner: str) -> tuple[int, int]:
        paths = list(self.layer(owner).rglob("*"))
        return sum(path.stat().st_size for path in paths if path.is_file()), len(paths)

    def disk_allocated(self, owner: str) -> int:
        return self.disk_used(owner)[0]

    def flush_disk(self, owner: str) -> None:
        """Nothing is in memory only."""

    def save_disk(self, owner: str, target: Path, check: Check) -> None:
        check()
        with tarfile.open(target, "w") as saved:
            saved.add(self.layer(owner), ".")

    async def survey(
        self, owner: str, path: str, max_bytes: int, directories: Sequence[str]
    ) -> Survey:
        await asyncio.sleep(0)
        self.surveys += 1
        file = self.layer(owner) / path.lstrip("/")
        head = file.read_bytes()[:max_bytes].hex() if file.is_file() else None
        places = [self.layer(owner) / directory.lstrip("/") for directory in directories]
        return Survey(head, tuple(_names(place) for place in places))

    def environment(self, mode: str, _: float | None = None) -> dict[str, str]:
        return {"MODE": mode}

    def kill(self, owner: str) -> None:
        """The tests' containers hold no process."""

    def disk_is_full(self, owner: str) -> bool:
        return "fill" in self.ran

    async def halt(self, owner: str) -> None:
        await asyncio.sleep(0)
        self.halted.add(owner)

    async def stop(self, owner: str) -> None:
        await asyncio.sleep(0)
        self.halted.discard(owner)
        spec = self.specs.pop(owner, None)
        if spec is not None:
            shutil.rmtree(spec.directory / "disk")

    async def kill_all_but_init(self, owner: str) -> None:
        if owner not in self.specs or owner in self.halted:
            raise ContainerGone("It is gone.")
        self.kills += 1

    async def exec(
        self,
        owner: str,
        argv: Sequence[str],
        *,
        cwd: str,
        env: Mapping[str, str],
        timeout: float | None,
        merge_output: bool = False,
        stdin: int | None = None,
    ) -> AsyncGenerator[Frame, None]:
        if argv[-1] in (SAVE_TMPFS, RESTORE_TMPFS):
            # There are no tmpfs: nothing is to be saved.
            yield Exited(0, None, 1)
            return
        assert (argv[:-1], cwd, merge_output) == (["@shell", "-c"], "/root", True)
        self.ran.append(argv[-1])
        self.environments.append(dict(env))
        upper = self.layer(owner)
        yield Started(2)
        word, _, rest = argv[-1].partition(" ")
        end: Frame = Exited(0, None, 5)
        if word == "write":
            name, _, text = rest.partition(" ")
            path = upper / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        elif word == "remove":
            (upper / rest).unlink()
        elif word == "say":
            yield Chunk("stdout", rest.encode() + b"\n")
        elif word == "moan":
            yield Chunk("stdout", rest.encode() + b"\n")
            end = Exited(100, None, 5)
        elif word == "fail":
            end = Exited(int(rest), None, 5)
        elif word == "signal":
            end = Exited(128 + int(rest), int(rest), 5)
        elif word == "fill":
            end = Exited(1, None, 5)
        elif word == "oom":
            end = Exited(137, 9, 5, out_of_memory=True)
        elif word == "vanish":
            raise ExecKilled("The sandbox ended while the command ran.", signal=9)
        elif word == "lose":
            raise LauncherLost("What starts containers and commands died, and is replaced.")
        elif word == "sleep":
            limit = timeout if timeout is not None else 60.0
            await asyncio.sleep(min(float(rest), limit))
            if float(rest) >= limit:
                end = TimedOut(round(limit * 1000))
        yield end


def _names(directory: Path) -> tuple[str, ...]:
    return tuple(entry.name for entry in directory.iterdir()) if directory.is_dir() else ()


def tree_of(directory: Path) -> set[str]:
    """The names of everything below a directory."""
    return {str(path.relative_to(directory)) for path in directory.rglob("*")}

"""Kernels of the code interpreter as processes: how one is started in a container, and ended.

What a kernel belongs to, and when it is started, is the matter of
:mod:`hostruntime.sandbox.interpreter` and :mod:`hostruntime.sandbox.warm_kernels`.  It has a
directory of two files, ``status`` and ``socket``, which the former describes.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from hostruntime.container.cgroups import cgroup_layout, is_populated, kill_group
from hostruntime.container.launcher import NO_PROCESS_MESSAGE, close_all
from hostruntime.container.manager import ContainerManager
from hostruntime.errors import CwdNotFound, Exhausted, InterpreterUnavailable, KernelFailed
from hostruntime.host.patience import Patience, scaled
from hostruntime.host.records import BadRecord, read_record
from hostruntime.host.tasks import in_thread
from hostruntime.sandbox.background import Status
from hostruntime.sandbox.bridges import BOOTSTRAP, SOCKET, Bridge, BridgeGone, listen

STATUS = "status"
_START_SECONDS = 90.0
_END_SECONDS = 3.0
_POLL_SECONDS = 0.01
_NEW_FILE = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
_NOT_FOUND_STATUS = 127
_STATUSES = TypeAdapter(Status)


@dataclass(frozen=True)
class Kernels:
    """Starts and ends the kernels of containers, each with its bridge, by owner and context."""

    containers: ContainerManager

    def environment(self, owner: str, environment: Mapping[str, str]) -> dict[str, str]:
        """What a kernel of this owner's is started with.  Raises ContainerGone."""
        mode = self.containers.get(owner).slot.mode
        return {**self.containers.environment(mode), **environment}

    async def launch(
        self,
        owner: str,
        context_id: str,
        directory: Path,
        cwd: str,
        environment: Mapping[str, str],
    ) -> None:
        """Start a bridge, with its files in ``directory``, which may be there already.

        Raises CwdNotFound, Exhausted, KernelFailed, ContainerGone, ContainerPaused, OSError.
        """
        descriptors: list[int] = []
        try:
            await in_thread(_create_files, directory, descriptors)
            message: dict[str, Any] = {
                "name": self.containers.get(owner).name,
                "command": command_id(context_id),
                "argv": ["python3", "-c", BOOTSTRAP],
                "cwd": cwd,
                "env": self.environment(owner, environment),
            }
            await self._supervise(owner, message, descriptors)
        finally:
            close_all(descriptors)

    async def _supervise(self, owner: str, message: dict[str, Any], descriptors: list[int]) -> None:
        answer, answer_in = os.pipe()
        # The log, the status, the answer, and what the bridge listens on.
        descriptors.insert(2, answer_in)
        try:
            said = await self.containers.launchers.supervise(message, descriptors, answer)
        except TimeoutError as error:
            raise KernelFailed("The kernel did not start in time; try again.") from error
        finally:
            os.close(answer)
        reply = json.loads(said) if said else {"error": "its supervisor died"}
        if reply.get("code") == CwdNotFound.code:
            raise CwdNotFound(str(reply["detail"]))
        if "error" in reply:
            self.containers.get(owner)
            raise Exhausted(NO_PROCESS_MESSAGE)

    async def start(self, directory: Path, language: str, cwd: str) -> None:
        """Have a bridge that was launched start its kernel, and wait until that is ready.

        Raises InterpreterUnavailable, KernelFailed.
        """
        try:
            async with (
                asyncio.timeout(scaled(_START_SECONDS)),
                Bridge.connect(directory) as bridge,
            ):
                answer = await bridge.start(language, cwd)
        except TimeoutError as error:
            raise KernelFailed("The kernel did not start in time; try again.") from error
        except BridgeGone as error:
            if await _exit_code(directory) == _NOT_FOUND_STATUS:
                raise _unavailable("It has no python3.") from error
            raise KernelFailed("The kernel's process ended while it was started.") from error
        if answer.kind == "unavailable":
            raise _unavailable(answer.message)
        if answer.kind == "failed":
            raise KernelFailed(f"The kernel could not be started. {answer.message}")

    def kill(self, owner: str, context_id: str) -> None:
        """Kill all that a context has started."""
        kill_group(self._group(owner, context_id))

    async def end(self, owner: str, context_id: str) -> None:
        """Kill it, and wait for a while until it is gone."""
        group = self._group(owner, context_id)
        patience = Patience(_END_SECONDS)
        while group.is_dir():
            kill_group(group)
            if not is_populated(group):
                with contextlib.suppress(OSError):
                    group.rmdir()
                    return
            if patience.exhausted():
                return
            await asyncio.sleep(_POLL_SECONDS)

    def _group(self, owner: str, context_id: str) -> Path:
        groups = cgroup_layout().container(self.containers.name_of(owner))
        return groups.background_group(command_id(context_id))


def command_id(context_id: str) -> str:
    """What a context's bridge is called among the commands that run in the background."""
    return f"code-{context_id}"


def remove_files(directory: Path) -> None:
    """Remove what :meth:`Kernels.launch` has created, if it is there; blocks.

    Before the kernel is killed: its supervisor looks whether they are there before it lets it run.
    """
    for name in (STATUS, SOCKET):
        (directory / name).unlink(missing_ok=True)


def _create_files(directory: Path, descriptors: list[int]) -> None:
    """Create a kernel's files; add what its bridge is started with, without the answer's pipe."""
    directory.parent.mkdir(mode=0o700, exist_ok=True)
    directory.mkdir(mode=0o700, exist_ok=True)
    # It prints nothing but what nobody is to read.
    descriptors.append(os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC))
    status = os.open(directory / STATUS, _NEW_FILE, 0o600)
    descriptors.append(status)
    fcntl.flock(status, fcntl.LOCK_EX)
    descriptors.append(listen(directory).detach())


async def _exit_code(directory: Path) -> int | None:
    """How a bridge has ended, which its supervisor notices a moment later; None if it has not."""
    patience = Patience(_END_SECONDS)
    while True:
        status = await in_thread(_read_status, directory)
        if status is not None and status.status is not None:
            return os.waitstatus_to_exitcode(status.status)
        if patience.exhausted():
            return None
        await asyncio.sleep(_POLL_SECONDS)


def _read_status(directory: Path) -> Status | None:
    try:
        return read_record(directory / STATUS, _STATUSES)
    except BadRecord:
        # Empty, or just being written.
        return None


def _unavailable(reason: str) -> InterpreterUnavailable:
    return InterpreterUnavailable(
        f"The sandbox's image cannot run this code: {reason[:1000]} Use the base code-interpreter, "
        "which has kernels for Python and JavaScript, or a template on it; for Python, "
        "`pip install ipykernel` in a recipe is enough."
    )

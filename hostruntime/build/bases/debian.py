"""The first base: Debian itself, by mmdebstrap(1), from the mirror the host uses.

The bootstrap runs in namespaces of its own and dies with the agent, so an interrupted one leaves
no mount and no process.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import shlex
import shutil
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from hostruntime.build.bases.definitions import DEBIAN_SUITE, BaseDefinition
from hostruntime.container.merging import PLACEHOLDER
from hostruntime.errors import HostFault, HostUnavailable
from hostruntime.host.patience import Patience, process_tree
from hostruntime.host.run import Process, spawn
from hostruntime.host.tasks import in_thread
from hostruntime.network.registries import AptSource

# It downloads, and may wait for a mirror.
_IDLE_SECONDS = 300.0
_POLL_SECONDS = 0.2
_LOG_TAIL = 2000
# apt's "E: Failed to fetch http://… Temporary failure resolving …".
_NOT_FETCHED = re.compile(r"^E: Failed to fetch (\S+) +(.+)$", re.MULTILINE)
_log = logging.getLogger(__name__)
_KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")


async def bootstrap(
    base: BaseDefinition,
    target: Path,
    sources: Sequence[AptSource],
    progress: Callable[[str], None],
) -> None:
    """Fill ``target`` (a directory that does not exist yet) with a Debian system.

    Raises HostUnavailable without mmdebstrap, HostFault when it fails, in one sentence: all that it
    said goes to the agent's log.  Cancelling ends it.
    """
    log = target.with_name(f"{target.name}.log")
    process = await in_thread(_begin, base, target, sources, log)
    said = _Log(log)
    patience = Patience(_IDLE_SECONDS, lambda: process_tree(process.pid), marker=lambda: said.size)
    try:
        async with patience:
            await _watched(process, said, progress)
    except TimeoutError:
        _log.error("mmdebstrap was ended; it said: %s", await in_thread(_tail, log))
        raise HostFault(
            f"Debian could not be fetched: mmdebstrap {patience.reason}. Check whether this "
            "machine's apt sources answer."
        ) from None
    finally:
        await in_thread(_end, process)
    await in_thread(_finish, base, target, process, log, bool(sources))


def _begin(base: BaseDefinition, target: Path, sources: Sequence[AptSource], log: Path) -> Process:
    if shutil.which("mmdebstrap") is None:
        raise HostUnavailable("mmdebstrap is not installed; run `apt-get install mmdebstrap`.")
    return spawn(_confined(_command(base, target, sources)), log=log)


def _finish(
    base: BaseDefinition,
    target: Path,
    process: Process,
    log: Path,
    named: bool,
) -> None:
    if process.returncode != 0:
        _log.error("mmdebstrap failed; it said: %s", _tail(log))
        raise HostFault(reason_in(log.read_text(errors="replace")))
    if named:
        # A container is told of the mirrors of the host it runs on.
        (target / "etc/apt/sources.list").write_bytes(PLACEHOLDER + b"\n")
    _add(base, target)
    log.unlink()


def _add(base: BaseDefinition, target: Path) -> None:
    for directory in base.directories:
        (target / directory).mkdir(mode=0o755, parents=True, exist_ok=True)
    for name, mode, text in base.files:
        (target / name).write_text(text)
        (target / name).chmod(mode)


def _command(base: BaseDefinition, target: Path, sources: Sequence[AptSource]) -> list[str]:
    options = [f"--dpkgopt={option}" for option in base.dpkg_options]
    options += [f"--essential-hook={_answered(answer)}" for answer in base.debconf]
    if _KEYRING.is_file():
        options.append(f"--keyring={_KEYRING}")
    return [
        "mmdebstrap",
        "--mode=root",
        "--variant=minbase",
        f"--include={','.join(base.packages)}",
        *options,
        DEBIAN_SUITE,
        str(target),
        # None of them: mmdebstrap then goes where it goes by itself.
        *(
            f"deb {source.site} {DEBIAN_SUITE}{source.ending} {source.component}"
            for source in sources
        ),
    ]


def _answered(answer: str) -> str:
    """A shell command that answers a question before its package asks (mmdebstrap(1), HOOKS)."""
    return f'printf "%s\\n" {shlex.quote(answer)} | chroot "$1" debconf-set-selections'


def _confined(command: Sequence[str]) -> list[str]:
    """In its own mount and pid namespaces, killed with all it started when we die."""
    return [
        *("setpriv", "--pdeathsig=KILL", "--"),
        *("unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "--"),
        *command,
    ]


@dataclass
class _Log:
    """What a program writes to its log, a piece at a time; ``size`` is how long it was seen."""

    path: Path
    size: int = 0
    _read: int = 0

    def more(self) -> list[str]:
        """The whole lines that have been added.  Blocks; raises OSError."""
        with self.path.open("rb") as file:
            file.seek(self._read)
            data = file.read()
        self.size = self._read + len(data)
        whole = data[: data.rfind(b"\n") + 1]
        self._read += len(whole)
        return whole.decode(errors="replace").splitlines()


async def _watched(process: Process, log: _Log, progress: Callable[[str], None]) -> None:
    while True:
        ended = process.poll() is not None
        for line in await in_thread(log.more):
            if line.startswith("I: "):
                progress(line.removeprefix("I: ").strip())
        if ended:
            return
        await asyncio.sleep(_POLL_SECONDS)


def _end(process: Process) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def reason_in(log: str) -> str:
    """Why mmdebstrap failed, from what it and apt-get(8) said, as sentences."""
    if found := _NOT_FETCHED.search(log):
        address, why = found.groups()
        return (
            f"Debian could not be fetched: {address}: {why.strip()}. Check this machine's network, "
            "DNS and apt sources."
        )
    errors = [line.removeprefix("E: ") for line in log.splitlines() if line.startswith("E: ")]
    last = errors[0] if errors else "it did not say why"
    return f"Debian could not be bootstrapped: {last}. The agent's log has all that was said."


def _tail(log: Path) -> str:
    return log.read_text(errors="replace")[-_LOG_TAIL:].strip()

"""The root base: Debian itself, bootstrapped by mmdebstrap(1) from the host's mirror.

The bootstrap runs in its own namespaces and is killed when the agent dies, so an interrupted one
leaves no mounts or processes behind.
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

# It downloads, so it may have to wait for a mirror.
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

    Raises HostUnavailable without mmdebstrap, HostFault with a one-sentence reason if it fails; its
    full output goes to the agent's log. Cancelling kills it.
    """
    log = target.with_name(f"{target.name}.log")
    process = await in_thread(_start, base, target, sources, log)
    output = _Log(log)
    patience = Patience(
        _IDLE_SECONDS, lambda: process_tree(process.pid), marker=lambda: output.size
    )
    try:
        async with patience:
            await _watch(process, output, progress)
    except TimeoutError:
        _log.error("mmdebstrap was killed; its output: %s", await in_thread(_tail, log))
        raise HostFault(
            f"Debian could not be fetched: mmdebstrap {patience.reason}. Check whether this "
            "machine's apt sources answer."
        ) from None
    finally:
        await in_thread(_kill, process)
    await in_thread(_finish, base, target, process, log, bool(sources))


def _start(base: BaseDefinition, target: Path, sources: Sequence[AptSource], log: Path) -> Process:
    if shutil.which("mmdebstrap") is None:
        raise HostUnavailable("mmdebstrap is not installed; run `apt-get install mmdebstrap`.")
    return spawn(_isolated(_command(base, target, sources)), log=log)


def _finish(
    base: BaseDefinition,
    target: Path,
    process: Process,
    log: Path,
    has_sources: bool,
) -> None:
    if process.returncode != 0:
        _log.error("mmdebstrap failed; its output: %s", _tail(log))
        raise HostFault(failure_reason(log.read_text(errors="replace")))
    if has_sources:
        # Each container gets the mirrors of the host it runs on.
        (target / "etc/apt/sources.list").write_bytes(PLACEHOLDER + b"\n")
    _add_files(base, target)
    log.unlink()


def _add_files(base: BaseDefinition, target: Path) -> None:
    for directory in base.directories:
        (target / directory).mkdir(mode=0o755, parents=True, exist_ok=True)
    for name, mode, text in base.files:
        (target / name).write_text(text)
        (target / name).chmod(mode)


def _command(base: BaseDefinition, target: Path, sources: Sequence[AptSource]) -> list[str]:
    options = [f"--dpkgopt={option}" for option in base.dpkg_options]
    options += [f"--essential-hook={_preseed_hook(answer)}" for answer in base.debconf]
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
        # Without any, mmdebstrap uses its default mirror.
        *(
            f"deb {source.site} {DEBIAN_SUITE}{source.suffix} {source.component}"
            for source in sources
        ),
    ]


def _preseed_hook(answer: str) -> str:
    """Return a shell command that preseeds a debconf answer (mmdebstrap(1), HOOKS)."""
    return f'printf "%s\\n" {shlex.quote(answer)} | chroot "$1" debconf-set-selections'


def _isolated(command: Sequence[str]) -> list[str]:
    """Run in new mount and pid namespaces, killed with all its children when the agent dies."""
    return [
        *("setpriv", "--pdeathsig=KILL", "--"),
        *("unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "--"),
        *command,
    ]


@dataclass
class _Log:
    """Reads a program's log incrementally; ``size`` is its length when last read."""

    path: Path
    size: int = 0
    _read: int = 0

    def read_new_lines(self) -> list[str]:
        """Return the complete lines added since the last call.  Blocks; raises OSError."""
        with self.path.open("rb") as file:
            file.seek(self._read)
            data = file.read()
        self.size = self._read + len(data)
        complete = data[: data.rfind(b"\n") + 1]
        self._read += len(complete)
        return complete.decode(errors="replace").splitlines()


async def _watch(process: Process, log: _Log, progress: Callable[[str], None]) -> None:
    while True:
        exited = process.poll() is not None
        for line in await in_thread(log.read_new_lines):
            if line.startswith("I: "):
                progress(line.removeprefix("I: ").strip())
        if exited:
            return
        await asyncio.sleep(_POLL_SECONDS)


def _kill(process: Process) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def failure_reason(log: str) -> str:
    """Return why mmdebstrap failed, in sentences, from its output and apt-get(8)'s."""
    if found := _NOT_FETCHED.search(log):
        address, why = found.groups()
        return (
            f"Debian could not be fetched: {address}: {why.strip()}. Check this machine's network, "
            "DNS and apt sources."
        )
    errors = [line.removeprefix("E: ") for line in log.splitlines() if line.startswith("E: ")]
    last = errors[0] if errors else "it did not say why"
    return f"Debian could not be bootstrapped: {last}. The agent's log has the full output."


def _tail(log: Path) -> str:
    return log.read_text(errors="replace")[-_LOG_TAIL:].strip()

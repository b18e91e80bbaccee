"""Test what this machine's kernel supports: ``python -m hostruntime.container.trials DIRECTORY``.

Each trial performs, with the agent's own code, one operation that containers depend on;
``DIRECTORY`` is on the file system of the state directory.  A trial has its own process and mount
namespace, so that everything it creates disappears with it, even if it is killed; the only lasting
effect is that the kernel may load a module.  Needs root.  Prints one JSON object per line,
``{"name": …, "error": …}``, as each finishes; the error is null on success.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

from hostruntime.container import disk
from hostruntime.container.rootfs import RootfsPlan, container_extents, id_extents, mount_rootfs
from hostruntime.errors import HostError
from hostruntime.host import kernel
from hostruntime.host.ids import ID_BASE, IDS_PER_SLOT
from hostruntime.host.patience import Patience, process_tree
from hostruntime.host.run import run
from hostruntime.network import firewall
from hostruntime.network.policy import deny_list

_SECONDS = 30.0
_ERROR_BYTES = 4096
_DISK_MB = 8
# Every trial mounts its own empty tmpfs here.
_SCRATCH = Path("/run")
_CGROUPS = Path("/sys/fs/cgroup")


class TrialError(Exception):
    """An operation did not work, although the kernel returned no error."""


def openat2(_: Path) -> None:
    """Open a path below a directory without following links (Linux 5.6)."""
    how = kernel.RESOLVE_BENEATH | kernel.RESOLVE_NO_SYMLINKS
    root = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    kernel.openat2("proc", os.O_PATH | os.O_DIRECTORY, dir_fd=root, resolve=how)


def user_namespace(_: Path) -> None:
    """Create user namespaces with a slot's range of host ids, as root and as the slot's root."""
    kernel.create_user_namespace(id_extents(ID_BASE))
    kernel.create_user_namespace(container_extents(ID_BASE), ID_BASE)


def idmapped_mount(directory: Path) -> None:
    """Mount the state directory's file system with ids shifted (mount_setattr(2), Linux 5.12)."""
    mapped = _SCRATCH / "shown"
    mapped.mkdir()
    kernel.bind_idmapped(directory, mapped, kernel.create_user_namespace(id_extents(ID_BASE)))
    owner = directory.stat().st_uid
    if owner < IDS_PER_SLOT and mapped.stat().st_uid != ID_BASE + owner:
        raise TrialError("an id-mapped mount shows ids as they are")


def loop_device(directory: Path) -> None:
    """Mount a small file as a container's disk, and write to it."""
    disk_dir = _SCRATCH / "disk"
    disk_dir.mkdir()
    disk.mount_anonymous(directory, disk_dir, _DISK_MB)
    (disk_dir / "written").write_bytes(bytes(100_000))


def overlay(directory: Path) -> None:
    """Mount a container's root over the file system, and write to it as the container."""
    disk_dir = _SCRATCH / "disk"
    disk_dir.mkdir()
    disk.mount_anonymous(directory, disk_dir, _DISK_MB)
    (disk_dir / "runtime").mkdir()
    plan = RootfsPlan(_SCRATCH / "root", directory, disk_dir / "runtime", disk_dir, None, ID_BASE)
    os.chdir(mount_rootfs(plan, kernel.create_user_namespace(id_extents(ID_BASE))))
    owner = Path().stat()
    os.setresgid(owner.st_gid, owner.st_gid, owner.st_gid)
    os.setresuid(owner.st_uid, owner.st_uid, owner.st_uid)
    Path(f".{os.getpid()}").write_bytes(b"written")


def cgroup_kill(_: Path) -> None:
    """Kill a process by its control group in the unified hierarchy (Linux 5.14)."""
    unified = _CGROUPS / "unified" if (_CGROUPS / "unified").is_dir() else _CGROUPS
    own_group = next(
        line.removeprefix("0::").strip("/")
        for line in Path("/proc/self/cgroup").read_text().splitlines()
        if line.startswith("0::")
    )
    group = unified / own_group / f"orkestr-trial-{os.getpid()}"
    group.mkdir()
    try:
        victim = _fork(signal.pause)
        try:
            (group / "cgroup.procs").write_text(str(victim))
            (group / "cgroup.kill").write_text("1")
        finally:
            killed = _status(victim, Patience(1.0, lambda: [victim])) == -signal.SIGKILL
    finally:
        group.rmdir()
    if not killed:
        raise TrialError("cgroup.kill killed nothing")


def enter_by_pidfd(_: Path) -> None:
    """Enter all namespaces of a process that is in a user namespace (setns(2), Linux 5.8)."""
    ready_out, ready_in = os.pipe()

    def unshare_and_wait() -> None:
        os.unshare(kernel.ALL_NAMESPACES)
        os.write(ready_in, b"1")
        signal.pause()

    target = _fork(unshare_and_wait)
    os.close(ready_in)
    try:
        if os.read(ready_out, 1) != b"1":
            raise TrialError("the kernel refused new namespaces (unshare(2))")
        handle = os.pidfd_open(target)
        os.setns(handle, kernel.ALL_NAMESPACES)
    finally:
        os.kill(target, signal.SIGKILL)
        os.waitpid(target, 0)


def network(_: Path) -> None:
    """Create a network namespace, a pair of interfaces, and an instance's firewall in it."""
    os.unshare(os.CLONE_NEWNET)
    run(["ip", "link", "add", "one", "type", "veth", "peer", "name", "other"], timeout=_SECONDS)
    firewall.install(
        firewall.FirewallPlan(
            table="trial",
            prefix="trial-",
            proxy=IPv4Address("198.18.0.1"),
            proxy_port=firewall.PROXY_PORT,
            restricted=IPv4Network("198.18.64.0/18"),
            open=IPv4Network("198.18.128.0/18"),
            resolvers=("192.0.2.53",),
            denied=deny_list(),
            permitted=(),
            mark=firewall.proxy_mark(0),
        )
    )


TRIALS: dict[str, Callable[[Path], None]] = {
    "openat2": openat2,
    "user namespaces": user_namespace,
    "id-mapped mounts": idmapped_mount,
    "loop devices": loop_device,
    "overlay": overlay,
    "cgroup.kill": cgroup_kill,
    "setns": enter_by_pidfd,
    "network": network,
}


def run_trial(trial: Callable[[Path], None], directory: Path) -> str | None:
    """Run a trial in its own process; return its error, or None.  Single-threaded only."""
    read_end, write_end = os.pipe()
    child = _fork(lambda: _run_isolated(trial, directory, write_end))
    os.close(write_end)
    with os.fdopen(read_end, "rb") as pipe:
        patience = Patience(_SECONDS, lambda: process_tree(child))
        status = _status(child, patience)
        error = pipe.read(_ERROR_BYTES).decode("utf-8", "replace")
    if status is None:
        return f"it {patience.reason}"
    return error or (f"it was killed by signal {-status}" if status else None)


def _run_isolated(trial: Callable[[Path], None], directory: Path, error_fd: int) -> None:
    try:
        os.unshare(os.CLONE_NEWNS)
        kernel.mount("none", "/", None, kernel.MS_REC | kernel.MS_PRIVATE)
        # Opened first, as the scratch tmpfs may be mounted over a parent of it.
        directory_fd = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        kernel.mount("tmpfs", _SCRATCH, "tmpfs", kernel.MS_NOSUID, "mode=755")
        trial(Path(f"/proc/self/fd/{directory_fd}"))
    except (OSError, HostError, TrialError) as error:
        os.write(error_fd, (str(error) or repr(error)).encode()[:_ERROR_BYTES])


def _fork(action: Callable[[], object]) -> int:
    child = os.fork()
    if child == 0:
        try:
            action()
        finally:
            os._exit(0)
    return child


def _status(child: int, patience: Patience) -> int | None:
    """A child's exit status, negative for a signal; None if it stalled and was killed."""
    while not patience.exhausted():
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def main(argv: list[str]) -> None:
    """Run all trials, one after the other."""
    for name, trial in TRIALS.items():
        answer = {"name": name, "error": run_trial(trial, Path(argv[1]))}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv)

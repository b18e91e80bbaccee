"""A machine in QEMU: booted from a disk and a kernel, found over ssh, stopped by its own pid."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from tests.vm.guest import Guest, free_port
from tests.vm.places import VmError

MEMORY = "4G"
PROCESSORS = 2
BOOT_SECONDS = 900.0
_PROBE_SECONDS = 30.0
_STOP_SECONDS = 120.0
# What a kernel without a disk says at the end: it has come through all of its own start.
_BOOTED = b"Unable to mount root fs"
_NICE = ["nice", "-n", "10"]
_BARE = [
    *("qemu-system-x86_64", "-nodefaults", "-display", "none", "-cpu", "max"),
    *("-smp", str(PROCESSORS), "-m", MEMORY),
]
_EMULATION = "tcg,thread=multi,tb-size=1024"


@dataclass(frozen=True)
class Files:
    """What a machine boots from, and the directory for what it says."""

    disk: Path
    kernel: Path
    initrd: Path
    directory: Path

    @property
    def console(self) -> Path:
        """What the machine wrote to its serial line."""
        return self.directory / "console.log"

    @property
    def log(self) -> Path:
        """What QEMU itself said."""
        return self.directory / "qemu.log"

    @property
    def pid(self) -> Path:
        """QEMU's process id, while it runs."""
        return self.directory / "qemu.pid"

    @property
    def port(self) -> Path:
        """The port on loopback that leads to the machine's ssh server."""
        return self.directory / "ssh.port"


def accelerator(kernel: Path) -> str:
    """QEMU's `-accel`: KVM where this kernel starts under it, else emulation."""
    return "kvm" if _kvm_boots(kernel) else _EMULATION


@functools.cache
def _kvm_boots(kernel: Path) -> bool:
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return False
    command = [
        *(*_BARE, "-accel", "kvm", "-kernel", str(kernel), "-no-reboot", "-serial", "stdio"),
        *("-append", "console=ttyS0 panic=-1"),
    ]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=_PROBE_SECONDS
        )
    except subprocess.TimeoutExpired as slow:
        return _BOOTED in (slow.stdout or b"")
    return _BOOTED in done.stdout


class Machine:
    """One booted machine.  It ends with this process unless it is to stay."""

    def __init__(self, files: Files, key: Path) -> None:
        self._files = files
        self._key = key
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, *, stays: bool = False) -> Guest:
        """Boot it, and wait until systemd has nothing more to start. Raises VmError."""
        port = free_port()
        self._process = subprocess.Popen(
            [*([] if stays else ["setpriv", "--pdeathsig", "TERM"]), *_NICE, *self._command(port)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self._files.log.open("wb"),
            start_new_session=True,
        )
        self._files.port.write_text(f"{port}\n")
        guest = Guest(port, self._key)
        try:
            self.await_boot(guest)
        except BaseException:
            self.kill()
            raise
        return guest

    def await_boot(self, guest: Guest) -> None:
        """Wait until the guest is up. Raises VmError with the end of its console."""
        deadline = time.monotonic() + BOOT_SECONDS
        while time.monotonic() < deadline and (
            self._process is None or self._process.poll() is None
        ):
            if guest.is_up():
                return
            time.sleep(2)
        raise VmError(f"the machine did not come up; its console ends:\n{self.console_tail()}")

    def stop(self, guest: Guest) -> None:
        """Power it off; kill it when it does not end."""
        with contextlib.suppress(VmError, subprocess.TimeoutExpired):
            guest.root("systemctl poweroff", timeout=60, check=False)
            if self._process is not None:
                self._process.wait(_STOP_SECONDS)
        self.kill()

    def kill(self) -> None:
        """End it as a power cut would."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._files.pid.unlink(missing_ok=True)

    def console_tail(self) -> str:
        """The end of what it wrote to its serial line, and of what QEMU said."""
        said = b""
        for path in (self._files.console, self._files.log):
            with contextlib.suppress(OSError):
                said += path.read_bytes()[-3000:]
        return said.decode(errors="replace")

    def _command(self, port: int) -> list[str]:
        files = self._files
        return [
            *(*_BARE, "-accel", accelerator(files.kernel)),
            *("-kernel", str(files.kernel), "-initrd", str(files.initrd)),
            *("-append", "root=/dev/vda ro console=ttyS0 quiet"),
            *("-drive", f"file={files.disk},format=raw,if=virtio,cache=unsafe,discard=unmap"),
            *("-netdev", f"user,id=net,ipv6=off,hostfwd=tcp:127.0.0.1:{port}-:22"),
            *("-device", "virtio-net-pci,netdev=net", "-device", "virtio-rng-pci"),
            *("-serial", f"file:{files.console}", "-pidfile", str(files.pid)),
        ]


def stop_by_pid(files: Files) -> bool:
    """End a machine that another process left running; False if there is none."""
    try:
        pid = int(files.pid.read_text())
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
    except (OSError, ValueError):
        return False
    if os.fsencode(files.disk) not in command:
        return False
    os.kill(pid, signal.SIGTERM)
    for _ in range(100):
        if not Path(f"/proc/{pid}").exists():
            break
        time.sleep(0.1)
    files.pid.unlink(missing_ok=True)
    return True

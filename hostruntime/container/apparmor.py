"""The AppArmor profile of containers, if the kernel has AppArmor.

LXC can generate a profile per container (``lxc.apparmor.profile = generated``), but then runs
apparmor_parser(8) at every start and leaves files behind for each.  All containers of an instance
share one profile instead: it defines what a sandbox may do, is loaded when the agent starts, and
is removed with the instance.

LXC switches to the configured profile well before it executes the container's init, and still
needs capabilities then.  So it gets a profile of its own, which init leaves when it is executed.

The profile is defence in depth.  The user namespace, the system-call filter and the capabilities
already deny what it denies; it protects if one of them fails, and it denies mounts and the kernel's
files by what they are, not by how they are accessed.
"""

from __future__ import annotations

from pathlib import Path

from hostruntime.container.config import CAPABILITIES, INIT
from hostruntime.errors import HostError, HostUnavailable
from hostruntime.host.paths import Instance
from hostruntime.host.run import run

# liblxc reads it, too: unless it is Y, LXC does not use AppArmor.
_ENABLED = Path("/sys/module/apparmor/parameters/enabled")
_SECURITYFS = Path("/sys/kernel/security/apparmor")
# Fixes the meaning of the rules, whatever later versions mediate (apparmor.d(5), "Feature ABI").
_ABI = Path("/etc/apparmor.d/abi/3.0")
_PARSER = "apparmor_parser"
_SECONDS = 60.0


def profile_name(instance: Instance) -> str | None:
    """The profile of an instance's containers; None if the kernel does not use AppArmor."""
    return f"orkestr-{instance.index}" if enabled() else None


def enabled() -> bool:
    """Whether the kernel uses AppArmor."""
    try:
        return _ENABLED.read_text().strip() == "Y"
    except OSError:
        return False


def start_profile(name: str) -> str:
    """The name of the profile that LXC itself uses to start containers of profile ``name``."""
    return f"{name}-start"


def profile(name: str, abi: Path = _ABI) -> str:
    """The text of both profiles (apparmor.d(5)), for containers of profile ``name``.

    Neither is attached by the path of an executable; only init's execution switches profiles.
    """
    first = f"abi <{abi.parent.name}/{abi.name}>,\n" if abi.exists() else ""
    names = {"name": name, "start": start_profile(name), "init": INIT.partition(" ")[0]}
    return first + _RULES.format(capabilities=" ".join(CAPABILITIES), **names)


# `file` allows all file operations; the mount namespace limits which files exist.  Explicit denials
# are not logged by the kernel, as programs routinely try these.
_RULES = """\
profile {name} flags=(attach_disconnected,mediate_deleted) {{
  capability {capabilities},
  file,
  network,
  unix,
  signal (send,receive) peer={name},
  signal (receive) peer=unconfined,
  ptrace (trace,read,tracedby,readby) peer={name},
  ptrace (tracedby,readby) peer=unconfined,

  deny mount,
  deny remount,
  deny umount,
  deny pivot_root,
  deny /proc/sys/** wkl,
  deny /proc/sysrq-trigger rwkl,
  deny /proc/kcore rwkl,
  deny /sys/** wkl,
  deny /sys/kernel/security/** rwkl,
}}

profile {start} flags=(attach_disconnected,mediate_deleted) {{
  capability,
  /** rwlkm,
  {init} px -> {name},
  network,
  unix,
  signal,
  ptrace,
  mount,
  umount,
}}
"""


def is_loaded(name: str) -> bool:
    """Whether this profile and its start profile are loaded.  Raises HostUnavailable."""
    try:
        lines = (_SECURITYFS / "profiles").read_text().splitlines()
    except OSError as error:
        raise HostUnavailable(
            f"AppArmor is on, but {_SECURITYFS} cannot be read ({error.strerror}). Mount it: "
            "mount -t securityfs securityfs /sys/kernel/security"
        ) from error
    loaded = {line.rpartition(" (")[0] for line in lines}
    return {name, start_profile(name)} <= loaded


def load(name: str) -> None:
    """Load or replace both profiles, also for running containers.

    Raises HostUnavailable.
    """
    _parse(name, "--replace", "--skip-cache")
    if not is_loaded(name):
        raise HostUnavailable(f"The kernel did not load the AppArmor profile {name}.")


def ensure_loaded(name: str) -> None:
    """Load the profile if somebody removed it (aa-remove-unknown(8) does).

    Raises HostUnavailable.
    """
    if not is_loaded(name):
        load(name)


def unload(name: str) -> None:
    """Remove the profiles, which nothing may be using; idempotent.  Raises HostError."""
    if enabled():
        run([_PARSER, "--remove"], input=profile(name).encode(), timeout=_SECONDS, check=False)


def check() -> None:
    """Parse the profiles without loading them.  Raises HostUnavailable."""
    _parse("orkestr", "--skip-kernel-load", "--skip-cache")


def _parse(name: str, *options: str) -> None:
    try:
        run([_PARSER, *options], input=profile(name).encode(), timeout=_SECONDS)
    except HostError as error:
        raise HostUnavailable(
            f"AppArmor is on, and the profile for sandboxes cannot be used: {error.detail} "
            "Install the package apparmor; if it is there, boot with apparmor=0 to go without."
        ) from error

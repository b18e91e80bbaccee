"""Other ways to run ``/bin/true`` isolated on this machine, in a base image's own tree.

None has a server, an account, limits, a network policy or a disk of its own around it: each is the
least that any sandbox could take here, whatever the machine and the day are like.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

TRUE = "/bin/true"


def execute(command: list[str]) -> None:
    """Run a peer to its end."""
    subprocess.run(
        command,
        check=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


@contextmanager
def peers(tree: Path) -> Iterator[dict[str, Callable[[], None]]]:
    """What runs the command, by name; those that are not installed are left out."""
    with tempfile.TemporaryDirectory(prefix="orkestr-bench-") as directory:
        bundle = Path(directory)
        commands = {
            "bwrap": bubblewrap(tree),
            "runc": [*container("runc", tree, bundle), "orkestr-bench"],
            "crun": [*container("crun", tree, bundle), "orkestr-bench"],
            "systemd-nspawn": nspawn(tree),
        }
        yield {
            name: partial(execute, command)
            for name, command in commands.items()
            if shutil.which(command[0]) and works(command)
        }


def works(command: list[str]) -> bool:
    """Whether a peer runs here at all: some want another kernel, or a systemd."""
    return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True).returncode == 0


def bubblewrap(tree: Path) -> list[str]:
    """bwrap(1) with all namespaces of its own."""
    isolate = ["bwrap", "--ro-bind", str(tree), "/", "--unshare-all", "--proc", "/proc"]
    return [*isolate, "--dev", "/dev", TRUE]


def nspawn(tree: Path) -> list[str]:
    """systemd-nspawn(1), which needs no systemd to have started the machine."""
    quiet = ["--quiet", "--register=no", "--keep-unit", "--private-network", "--read-only"]
    return ["systemd-nspawn", *quiet, f"--directory={tree}", TRUE]


def container(runtime: str, tree: Path, directory: Path) -> list[str]:
    """An OCI runtime with the configuration that it proposes itself."""
    bundle = directory / runtime
    bundle.mkdir()
    if shutil.which(runtime):
        subprocess.run([runtime, "spec"], cwd=bundle, check=True)
        config = json.loads((bundle / "config.json").read_text())
        config["root"] = {"path": str(tree), "readonly": True}
        config["process"] |= {"args": [TRUE], "terminal": False}
        # A command that does nothing needs no view of them, and runc cannot mount a hybrid one.
        config["mounts"] = [each for each in config["mounts"] if each["type"] != "cgroup"]
        (bundle / "config.json").write_text(json.dumps(config))
    # Else crun refuses the hybrid layout of cgroups (cgroups(7)).
    options = ["--cgroup-manager=disabled"] if runtime == "crun" else []
    return [runtime, *options, "run", f"--bundle={bundle}"]

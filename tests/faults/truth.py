"""What rows say beside what the host has, and what is on the host beside what rows name."""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import suppress
from pathlib import Path

from hostruntime.errors import NotFound
from tests.faults.installation import Installation
from tests.faults.warm import WarmContainers
from tests.host.client import HostClient
from tests.processes import command_lines

CGROUPS = Path("/sys/fs/cgroup")
SANDBOXES = "SELECT id, status FROM sandboxes_app_sandbox"
TEMPLATES = "SELECT id, status, image_id, handed_over FROM templates_app_template"
SNAPSHOTS = "SELECT id, status, deleted_at IS NOT NULL FROM sandboxes_app_snapshot"
PASSING = {"starting", "pausing", "resuming"}
# What of a command line tells a program.
PROGRAMS = (
    *("manage.py up", "supervisord", "manage.py serve", "manage.py worker", "manage.py previews"),
    *("hostruntime.agent", "hostruntime.container.lxc", "postgres", "squid.conf", "helper.pyz"),
)
# Sandboxes that are used have one, for as long as they are used.
SPAWNER = "hostruntime.container.spawner"
# The number of a slot, which the next container has another of.
SLOT = re.compile(r"\b(ork\d+-[a-z])\d+\b")


def wrong_rows(installation: Installation) -> list[str]:
    """Every row whose status is not what the host says, while no client waits for one.

    Raises the host's errors, and psycopg's, while either is away.
    """
    with installation.stack.host() as host:
        return [
            *_wrong_sandboxes(installation, host),
            *_wrong_templates(installation, host),
            *_wrong_snapshots(installation, host),
        ]


def _wrong_sandboxes(installation: Installation, host: HostClient) -> Iterator[str]:
    known = {info.id: info for info in host.sandboxes()}
    rows = dict(installation.rows(SANDBOXES))
    for one, status in rows.items():
        info = known.get(one)
        found = "gone"
        if info is not None and info.state == "running":
            found = "paused" if info.paused else "running"
        live = status in {"running", "paused", *PASSING}
        if status in PASSING or (found != status if live else found != "gone"):
            yield f"{one} is {status}, and {found} on the host"
    for one, info in known.items():
        if one not in rows and info.state == "running":
            yield f"{one} runs, and no row names it"


def _wrong_templates(installation: Installation, host: HostClient) -> Iterator[str]:
    images = {image.id for image in host.images()}
    for one, status, image, handed_over in installation.rows(TEMPLATES):
        if status == "ready" and image not in images:
            yield f"{one} is ready, and its image is not there"
        if status == "ready" or not handed_over:
            continue
        found = _build(host, image)
        if (status == "building") != (found == "running"):
            yield f"{one} is {status}, and its build {found}"


def _build(host: HostClient, image: str) -> str:
    with suppress(NotFound):
        return host.build(image).state
    return "unknown"


def _wrong_snapshots(installation: Installation, host: HostClient) -> Iterator[str]:
    known = {info.id for info in host.snapshots()}
    for one, status, deleted in installation.rows(SNAPSHOTS):
        ready = status == "ready" and not deleted
        if status == "capturing" and not deleted:
            yield f"{one} is capturing, and nobody takes it"
        elif ready != (one in known):
            there = "there" if one in known else "not there"
            yield f"{one} is {'deleted' if deleted else status}, and {there}"


def still_running(installation: Installation, ended: Collection[str]) -> list[str]:
    """Which of these sandboxes and builds the host takes for running, though their end is near."""
    with installation.stack.host() as host:
        running = {info.id for info in host.sandboxes() if info.state == "running"}
        running |= {one for one in ended if _build(host, one) == "running"}
    return [f"{one} runs on the host, and was struck down" for one in ended if one in running]


# What is on the host ---------------------------------------------------------------------------


def holdings(installation: Installation) -> Counter[str]:
    """All that the installation has on the host, seen from outside: what, and whose.

    Without what belongs to containers that wait for a sandbox, and without the numbers of slots.
    """
    warm = WarmContainers.of(installation)
    found = [
        *_mounts(installation),
        *_groups(installation),
        *_links(installation),
        *_files(installation),
        *_processes(installation),
        *_elements(installation),
    ]
    return Counter(SLOT.sub(r"\1", warm.named(each)) for each in found if not warm.has(each))


def settled_holdings(installation: Installation) -> Counter[str]:
    """The same once it has stayed so for a while: slots are made ready in the background."""
    seen: Counter[str] = Counter()
    while (found := holdings(installation)) != seen:
        seen = found
        time.sleep(3)
    return seen


def _mounts(installation: Installation) -> Iterator[str]:
    places = (str(installation.run_dir.root), str(installation.stack.layout.state_dir))
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        path = line.split()[4]
        if path.startswith(places):
            yield f"mount {path.removeprefix(places[0]).lstrip('/')}"


def _groups(installation: Installation) -> Iterator[str]:
    group = installation.instance.prefix.rstrip("-")
    patterns = (f"{group}/*", f"*/{group}/*", f"orkestr.slice/{group}.service/*")
    seen = {path.name for pattern in patterns for path in CGROUPS.glob(pattern) if path.is_dir()}
    yield from (f"cgroup {name}" for name in seen)


def _links(installation: Installation) -> Iterator[str]:
    for path in Path("/sys/class/net").glob(f"{installation.instance.prefix}*"):
        yield f"link {path.name}"


def _files(installation: Installation) -> Iterator[str]:
    state, run = installation.stack.layout.state_dir, installation.run_dir
    for kind in ("disks", "staging", "snapshots", "images", "quarantine"):
        yield from (f"{kind} {path.name}" for path in (state / kind).iterdir())
    for directory in (state / "builds").iterdir():
        kept = {"build.json", "events.ndjson", "lxc.log"}
        names = [path.name for path in directory.iterdir() if path.name not in kept]
        yield from (f"build {directory.name} {name}" for name in names)
    for record in run.slots.glob("*.json"):
        with suppress(FileNotFoundError):
            yield f"slot of {json.loads(record.read_text())['owner']}"
    for entry in run.entries.iterdir():
        with suppress(FileNotFoundError):
            yield f"egress entry of {json.loads(entry.read_text())['owner']}"
    for path in Path("/sys/block").glob("loop*/loop/backing_file"):
        with suppress(OSError):
            backing = path.read_text().strip()
            if backing.startswith(str(state)):
                yield f"loop {Path(backing).name}"


def _processes(installation: Installation) -> Iterator[str]:
    own = f"ORKESTR_VAR={installation.stack.layout.var}".encode()
    egress, prefix = f"{installation.run_dir.egress}/", installation.instance.prefix
    for pid, line in command_lines().items():
        if line.startswith("[lxc monitor]") and line.split()[-1].startswith(prefix):
            yield f"monitor {line.split()[-1]}"
        elif SPAWNER not in line and (egress in line or own in _environment(pid)):
            yield next((f"process {kind}" for kind in PROGRAMS if kind in line), f"process {line}")


def _environment(pid: int) -> list[bytes]:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return []


def _elements(installation: Installation) -> Iterator[str]:
    """Elements of the firewall's sets that belong to no container that is there."""
    table = installation.instance.nft_table
    listed = subprocess.run(
        ["nft", "-j", "list", "set", "inet", table, "clients"], capture_output=True, text=True
    )
    if listed.returncode != 0:
        yield f"no firewall: {listed.stderr.strip()}"
        return
    addresses = {path.stem for path in installation.run_dir.entries.iterdir()}
    for item in json.loads(listed.stdout)["nftables"]:
        for element in item.get("set", {}).get("elem", []):
            value = element["elem"]["val"] if isinstance(element, dict) else element
            if value not in addresses:
                yield "nft element of nobody"


def of_the_ended(installation: Installation) -> list[str]:
    """What the host still has of sandboxes and builds that have ended by their rows."""
    over = {"terminated", "failed"}
    ended = [one for one, status in installation.rows(SANDBOXES) if status in over]
    ended += [row[2] for row in installation.rows(TEMPLATES) if row[1] == "failed"]
    found = holdings(installation)
    kinds = ("mount", "cgroup", "disks", "staging", "build ", "slot", "loop", "monitor")
    return sorted(
        what for what in found if what.startswith(kinds) and any(one in what for one in ended)
    )

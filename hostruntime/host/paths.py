"""Where everything of one installation lives: the state directory and the instance number.

The layout on disk, all of it root:root and 0700 (image trees keep their own modes inside)::

    <state dir>/
      images/<image id>/tree/       an immutable root tree      images/<image id>/image.json
      staging/<id>/                 incomplete trees, cleared at start
      trash/                        trees being unlinked, cleared at start and in the background
      builds/<build id>/            build.json, events.ndjson, and the container's directory
      sandboxes/<sandbox id>/       sandbox.json, commands, the container's directory
      layers/<scope>/<key>/         results of a build's steps, for reuse by another (layers.py)
      snapshots/<snapshot id>/      a sandbox's disk and tmpfs, to start others from (snapshots.py)
      volumes/<volume id>.ext4      storage that outlives sandboxes, a file system (volume/store.py)
      quarantine/<kind>.<name>/     what was set aside instead of deleted (quarantine.py)
      usage/<sandbox id>.json       what a sandbox has used, until collected
      disks/<owner>.img             a container's writable layer, a file system (disk.py)
      runtime/<mode>-<generation>/  runtime layers
      squid/                        generated configuration, logs, pid
      ballast                       disk space to release in an emergency (ballast.py)
      instance.json                 the instance number of this state directory
      installation.json             the installation it belongs to (installation.py)

A container's directory holds ``lxc.log``.

Several installations share a machine; each has a number 0..15 from which every name and address
it uses on the host is derived (:class:`Instance`).
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from ipaddress import IPv4Network
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from hostruntime.errors import HostUnavailable
from hostruntime.host.ids import HIGH_IDS, ID_BASE, ID_COUNT, IDS_PER_SLOT, MAX_INSTANCES, MAX_SLOTS
from hostruntime.host.records import BadRecord, read_record
from hostruntime.host.writing import write_atomically

CLAIMS_DIR = Path("/run/orkestr/instances")
# How many instances a machine had while each had 256 slots.
_EARLIER_INSTANCES = 16
_OBJECT: TypeAdapter[dict[str, Any]] = TypeAdapter(dict[str, Any])


@dataclass(frozen=True)
class StatePaths:
    """The state directory (absolute) and the names of what is in it."""

    root: Path

    @property
    def images(self) -> Path:
        """Published image trees."""
        return self.root / "images"

    @property
    def staging(self) -> Path:
        """Incomplete trees; on the same filesystem as ``images`` so that publishing is a rename."""
        return self.root / "staging"

    @property
    def trash(self) -> Path:
        """Trees that are being unlinked."""
        return self.root / "trash"

    @property
    def builds(self) -> Path:
        """One directory per build."""
        return self.root / "builds"

    @property
    def sandboxes(self) -> Path:
        """One directory per sandbox."""
        return self.root / "sandboxes"

    @property
    def warm(self) -> Path:
        """One directory per container that waits for its sandbox."""
        return self.root / "warm"

    @property
    def usage(self) -> Path:
        """Each sandbox's usage, until it is collected."""
        return self.root / "usage"

    @property
    def disks(self) -> Path:
        """Containers' writable layers, each a file system in a file."""
        return self.root / "disks"

    @property
    def layers(self) -> Path:
        """Results of builds' steps, by scope and key."""
        return self.root / "layers"

    @property
    def snapshots(self) -> Path:
        """One directory per snapshot."""
        return self.root / "snapshots"

    @property
    def volumes(self) -> Path:
        """Volumes, each a file system in a file."""
        return self.root / "volumes"

    @property
    def quarantine(self) -> Path:
        """What was set aside instead of deleted."""
        return self.root / "quarantine"

    @property
    def wanted_bases(self) -> Path:
        """An empty file for each base that is being made because somebody asked for it."""
        return self.root / "wanted-bases"

    @property
    def runtime(self) -> Path:
        """Runtime layers."""
        return self.root / "runtime"

    @property
    def lxc(self) -> Path:
        """LXC's lxcpath."""
        return self.root / "lxc"

    @property
    def squid(self) -> Path:
        """The egress proxy's configuration, logs and pid file."""
        return self.root / "squid"

    @property
    def ballast(self) -> Path:
        """Disk space that is released when there is no other."""
        return self.root / "ballast"

    @property
    def instance_file(self) -> Path:
        """The record of the instance number."""
        return self.root / "instance.json"

    @property
    def installation_file(self) -> Path:
        """The record of the installation that this state belongs to."""
        return self.root / "installation.json"

    @property
    def pid_file(self) -> Path:
        """The running agent's pid, locked while it runs."""
        return self.root / "agent.pid"

    def ensure(self) -> StatePaths:
        """Create every missing directory; return self.  Raises OSError."""
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.root.chmod(0o700)
        for directory in (
            self.images,
            self.staging,
            self.trash,
            self.builds,
            self.sandboxes,
            self.warm,
            self.usage,
            self.disks,
            self.layers,
            self.snapshots,
            self.volumes,
            self.quarantine,
            self.wanted_bases,
            self.runtime,
            self.lxc,
            self.squid,
        ):
            directory.mkdir(mode=0o700, exist_ok=True)
            directory.chmod(0o700)
        return self


@dataclass(frozen=True)
class Instance:
    """One installation's number on this machine, and the names and ranges that follow from it."""

    index: int

    def __post_init__(self) -> None:
        if not 0 <= self.index < MAX_INSTANCES:
            raise ValueError(f"instance index {self.index} is not within 0..{MAX_INSTANCES - 1}")

    @property
    def prefix(self) -> str:
        """Starts every LXC container and cgroup name of this instance: ``ork0-``."""
        return f"ork{self.index}-"

    def container_name(self, owner: str) -> str:
        """The name of a container that is started for this owner, and of its control groups."""
        return f"{self.prefix}{owner}"

    @property
    def nft_table(self) -> str:
        """The nftables table, family inet: ``orkestr_0``."""
        return f"orkestr_{self.index}"

    @property
    def subnet(self) -> IPv4Network:
        """The /16 that all slots' addresses come from."""
        return IPv4Network(f"10.{200 + self.index}.0.0/16")

    @property
    def id_base(self) -> int:
        """The first host uid/gid of this instance."""
        return ID_BASE + self.index * MAX_SLOTS * IDS_PER_SLOT

    def slot_id_base(self, slot: int) -> int:
        """The first of the 65,536 host uids/gids that slot number ``slot`` maps to 0..65535."""
        return self.id_base + slot * IDS_PER_SLOT

    def slot_name(self, slot: int) -> str:
        """The name of a slot's veth and network namespace: ``ork0-s17``."""
        return f"{self.prefix}s{slot}"


def claim_instance(paths: StatePaths, claims: Path = CLAIMS_DIR) -> Instance:
    """The instance number of this state directory, claiming a free one the first time.

    A claim is a file ``<claims>/<number>`` that holds the state directory's path.  The number is
    remembered in the state directory; a claim whose state directory is gone is free.  Numbers
    whose subnet the machine already routes elsewhere are passed over.

    Raises :class:`HostUnavailable` when all are taken, or containers of an earlier version use a
    number that there is no more.
    """
    claims.mkdir(mode=0o700, parents=True, exist_ok=True)
    # Nobody else may even open the lock: they could hold it against every agent (flock(2)).
    claims.chmod(0o700)
    recorded = _recorded_index(paths)
    _require_no_earlier_claim(paths, claims)
    with _file_lock(claims / ".lock"):
        if recorded is None:
            # Its record may be damaged while running containers still use the number's names.
            previously_claimed = (
                n for n in range(MAX_INSTANCES) if _holder(claims / str(n)) == paths.root
            )
            recorded = next(previously_claimed, None)
        candidates = [*([] if recorded is None else [recorded]), *range(MAX_INSTANCES)]
        for index in candidates:
            if _claimable(claims / str(index), paths, is_new=index != recorded):
                write_atomically(claims / str(index), f"{paths.root}\n".encode())
                write_json(paths.instance_file, {"index": index}, durable=True)
                return Instance(index)
    raise HostUnavailable(
        f"All {MAX_INSTANCES} instance numbers of this machine are taken. Run `make clean` in an "
        f"installation that is not needed any more, or delete its file in {claims}."
    )


def _require_no_earlier_claim(paths: StatePaths, claims: Path) -> None:
    """Raise HostUnavailable if a number is claimed that only earlier versions had (up to 15).

    Its containers would be found by nobody.  Claims do not survive a reboot, and nor do containers.
    """
    for index in range(MAX_INSTANCES, _EARLIER_INSTANCES):
        if _holder(claims / str(index)) == paths.root:
            raise HostUnavailable(
                f"Sandboxes of this installation may still run as instance {index}, a number that "
                f"this version does not have: a machine has {MAX_INSTANCES} now, of more sandboxes "
                "each. Run `make down` with the version that started them, or reboot; then start."
            )


def release_instance(paths: StatePaths, claims: Path = CLAIMS_DIR) -> None:
    """Release the instance number; nothing of the instance may be left on the host."""
    index = _recorded_index(paths)
    if index is None:
        return
    with _file_lock(claims / ".lock"):
        claim = claims / str(index)
        if _holder(claim) == paths.root:
            claim.unlink()
    paths.instance_file.unlink(missing_ok=True)


def is_claimed(paths: StatePaths, claims: Path = CLAIMS_DIR) -> bool:
    """Whether this state directory has an instance number, even if its record of it is gone."""
    return paths.instance_file.exists() or any(
        _holder(claims / str(index)) == paths.root for index in range(MAX_INSTANCES)
    )


def _recorded_index(paths: StatePaths) -> int | None:
    record = read_json(paths.instance_file)
    index = record.get("index") if record else None
    return index if isinstance(index, int) and 0 <= index < MAX_INSTANCES else None


def _claimable(claim: Path, paths: StatePaths, *, is_new: bool) -> bool:
    holder = _holder(claim)
    if holder == paths.root:
        return True
    if holder is not None and (holder / "instance.json").exists():
        return False
    return not is_new or not _has_route(Instance(int(claim.name)).subnet)


def _holder(claim: Path) -> Path | None:
    """The state directory named in a claim file; None if there is none."""
    if not claim.is_file():
        return None
    holder = claim.read_text(errors="replace").strip()
    return Path(holder) if holder.startswith("/") and "\0" not in holder else None


def _has_route(subnet: IPv4Network) -> bool:
    """Whether a route other than the default one overlaps ``subnet`` (proc(5), net/route)."""
    for line in Path("/proc/net/route").read_text().splitlines()[1:]:
        fields = line.split()
        address, mask = (int.from_bytes(bytes.fromhex(fields[i])[::-1]) for i in (1, 7))
        if mask and subnet.overlaps(IPv4Network((address, mask.bit_count()))):
            return True
    return False


@contextmanager
def _file_lock(path: Path) -> Iterator[None]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def ensure_subordinate_ids(
    files: tuple[Path, ...] = (Path("/etc/subuid"), Path("/etc/subgid")),
) -> None:
    """Reserve the runtime's id range for root (subuid(5)), so that no user gets it; idempotent.

    LXC itself does not need it: as root it writes the maps without newuidmap.
    """
    line = f"root:{ID_BASE}:{ID_COUNT + HIGH_IDS[2]}"
    for path in files:
        text = path.read_text() if path.exists() else ""
        if line not in text.splitlines():
            with path.open("a") as handle:
                handle.write(("" if text.endswith("\n") or not text else "\n") + line + "\n")


def write_json(path: Path, record: Mapping[str, Any], *, durable: bool = False) -> None:
    """Write a small record with :func:`write_atomically`.  Raises OSError."""
    data = json.dumps(record, indent=1).encode() + b"\n"
    write_atomically(path, data, durable=durable)


def read_json(path: Path) -> dict[str, Any] | None:
    """Read a small record that serves as a hint; None if there is no valid JSON object.

    Records that users' data depends on are read by :func:`hostruntime.host.records.read_record`.
    """
    try:
        return read_record(path, _OBJECT)
    except BadRecord:
        return None

"""Where everything of one installation lives: the state directory and the instance number.

The layout on disk, all of it root:root and 0700 (image trees keep their own modes inside)::

    <state dir>/
      images/<image id>/tree/       an immutable root tree      images/<image id>/image.json
      staging/<id>/                 half-made trees, cleared at start
      trash/                        trees being unlinked, cleared at start and in the background
      builds/<build id>/            build.json, events.ndjson, and the container's directory
      sandboxes/<sandbox id>/       sandbox.json, and the container's directory
      layers/<scope>/<key>/         what a build's steps had made, to begin another with (layers.py)
      snapshots/<snapshot id>/      a sandbox's disk and tmpfs, to start others from (snapshots.py)
      quarantine/<kind>.<name>/     what was set aside instead of deleted (quarantine.py)
      usage/<sandbox id>.json       what a sandbox has used, until collected
      disks/<owner>.img             a container's writable layer, a file system (disk.py)
      runtime/<mode>-<generation>/  runtime layers
      squid/                        generated configuration, logs, pid
      ballast                       room for when there is none (ballast.py)
      instance.json                 which instance number this state directory has
      installation.json             which installation's it is, and since when (installation.py)

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
from hostruntime.host import kernel
from hostruntime.host.records import BadRecord, read_record

MAX_INSTANCES = 16
MAX_SLOTS = 256
IDS_PER_SLOT = 65_536
ID_BASE = 1_000_000_000
ID_COUNT = MAX_INSTANCES * MAX_SLOTS * IDS_PER_SLOT
# Archives hold files of ids from all over 31 bits, and tar(1) as root gives them to those.  So the
# ids from IDS_PER_SLOT on are mapped too, for all slots to the same: (inside, outside, count).
# They are owners of files: no process can have one as its real id (seccomp.py), and no two
# containers see the same file system.  LXC wants an id of its own after the last, within a C int.
FAR_IDS = (IDS_PER_SLOT, ID_BASE + ID_COUNT, 2**31 - 1 - IDS_PER_SLOT)
CLAIMS = Path("/run/orkestr/instances")
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
        """Half-made trees; on the same filesystem as ``images`` so that publishing is a rename."""
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
    def usage(self) -> Path:
        """What each sandbox has used, until that is collected."""
        return self.root / "usage"

    @property
    def disks(self) -> Path:
        """Containers' writable layers, each a file system in a file."""
        return self.root / "disks"

    @property
    def layers(self) -> Path:
        """What builds' steps had made, by scope and key."""
        return self.root / "layers"

    @property
    def snapshots(self) -> Path:
        """One directory per snapshot."""
        return self.root / "snapshots"

    @property
    def quarantine(self) -> Path:
        """What was set aside instead of deleted."""
        return self.root / "quarantine"

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
        """Room that is let go of when there is no other."""
        return self.root / "ballast"

    @property
    def instance_file(self) -> Path:
        """Where the instance number is remembered."""
        return self.root / "instance.json"

    @property
    def installation_file(self) -> Path:
        """Which installation's this state is."""
        return self.root / "installation.json"

    @property
    def pid_file(self) -> Path:
        """The running agent's pid, locked while it runs."""
        return self.root / "agent.pid"

    def ensure(self) -> StatePaths:
        """Make every directory that is missing; return self.  Raises OSError."""
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.root.chmod(0o700)
        for directory in (
            self.images,
            self.staging,
            self.trash,
            self.builds,
            self.sandboxes,
            self.usage,
            self.disks,
            self.layers,
            self.snapshots,
            self.quarantine,
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


def claim_instance(paths: StatePaths, claims: Path = CLAIMS) -> Instance:
    """The instance number of this state directory, claiming a free one the first time.

    A claim is a file ``<claims>/<number>`` that holds the state directory's path.  The number is
    remembered in the state directory; a claim whose state directory is gone is free.  Numbers
    whose subnet the machine already routes elsewhere are passed over.

    Raises :class:`HostUnavailable` when all sixteen are taken.
    """
    claims.mkdir(mode=0o700, parents=True, exist_ok=True)
    # Not for others even to open: who opened the lock could hold it against every agent (flock(2)).
    claims.chmod(0o700)
    remembered = _remembered_index(paths)
    with _locked(claims / ".lock"):
        if remembered is None:
            # Its record may be bad, and what runs has the number's name all the same.
            own = (n for n in range(MAX_INSTANCES) if _holder(claims / str(n)) == paths.root)
            remembered = next(own, None)
        order = [*([] if remembered is None else [remembered]), *range(MAX_INSTANCES)]
        for index in order:
            if _claimable(claims / str(index), paths, fresh=index != remembered):
                write_atomically(claims / str(index), f"{paths.root}\n".encode())
                write_json(paths.instance_file, {"index": index}, durable=True)
                return Instance(index)
    raise HostUnavailable(
        f"All {MAX_INSTANCES} instance numbers of this machine are taken. Run `make clean` in an "
        f"installation that is not needed any more, or delete its file in {claims}."
    )


def release_instance(paths: StatePaths, claims: Path = CLAIMS) -> None:
    """Give the instance number back; nothing of the instance may be left on the host."""
    index = _remembered_index(paths)
    if index is None:
        return
    with _locked(claims / ".lock"):
        claim = claims / str(index)
        if _holder(claim) == paths.root:
            claim.unlink()
    paths.instance_file.unlink(missing_ok=True)


def _remembered_index(paths: StatePaths) -> int | None:
    record = read_json(paths.instance_file)
    index = record.get("index") if record else None
    return index if isinstance(index, int) and 0 <= index < MAX_INSTANCES else None


def _claimable(claim: Path, paths: StatePaths, *, fresh: bool) -> bool:
    holder = _holder(claim)
    if holder == paths.root:
        return True
    if holder is not None and (holder / "instance.json").exists():
        return False
    return not fresh or not _routed(Instance(int(claim.name)).subnet)


def _holder(claim: Path) -> Path | None:
    """The state directory that a claim names; None if it names none."""
    if not claim.is_file():
        return None
    named = claim.read_text(errors="replace").strip()
    return Path(named) if named.startswith("/") and "\0" not in named else None


def _routed(subnet: IPv4Network) -> bool:
    """Whether a route other than the default one overlaps ``subnet`` (proc(5), net/route)."""
    for line in Path("/proc/net/route").read_text().splitlines()[1:]:
        fields = line.split()
        address, mask = (int.from_bytes(bytes.fromhex(fields[i])[::-1]) for i in (1, 7))
        if mask and subnet.overlaps(IPv4Network((address, mask.bit_count()))):
            return True
    return False


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def ensure_subordinate_ids(
    files: tuple[Path, ...] = (Path("/etc/subuid"), Path("/etc/subgid")),
) -> None:
    """Reserve the runtime's id range for root (subuid(5)), so that no user is given it; idempotent.

    LXC itself does not need it: as root it writes the maps without newuidmap.
    """
    line = f"root:{ID_BASE}:{ID_COUNT + FAR_IDS[2]}"
    for path in files:
        text = path.read_text() if path.exists() else ""
        if line not in text.splitlines():
            with path.open("a") as handle:
                handle.write(("" if text.endswith("\n") or not text else "\n") + line + "\n")


def write_atomically(path: Path, data: bytes, mode: int = 0o600, *, durable: bool = False) -> None:
    """Replace ``path`` by ``data``: readers see the old or the new, whole, also if the writer dies.

    With ``durable`` the same goes for a power cut, and the new one is on disk on return; that costs
    two flushes of the disk.  Raises OSError.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
    try:
        with open(descriptor, "wb") as handle:  # noqa: PTH123 - a descriptor, not a path
            handle.write(data)
            if durable:
                handle.flush()
                os.fsync(handle.fileno())
        temporary.rename(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if durable:
        kernel.fsync(path.parent)


def write_json(path: Path, record: Mapping[str, Any], *, durable: bool = False) -> None:
    """Write a small record with :func:`write_atomically`.  Raises OSError."""
    data = json.dumps(record, indent=1).encode() + b"\n"
    write_atomically(path, data, durable=durable)


def read_json(path: Path) -> dict[str, Any] | None:
    """Read a small record that is a hint; None when there is none that is a JSON object.

    What somebody's work hangs on is read by :func:`hostruntime.host.records.read_record`.
    """
    try:
        return read_record(path, _OBJECT)
    except BadRecord:
        return None

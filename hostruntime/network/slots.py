"""Slots: a container's place on the network, and the policy in force there before it starts.

A slot is an index 0..255 and what follows from it: a range of host ids, a network namespace and,
unless the mode is `off`, an address. Namespaces are made ahead, per mode, in the background, so
that acquiring one costs two small files: the assignment, and what the egress proxy is to allow.
Everything else about a mode is in the instance's one nftables table
(:mod:`hostruntime.network.firewall`). A released namespace is destroyed, never reused.
"""

from __future__ import annotations

import grp
import json
import logging
import re
import shutil
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

from hostruntime.errors import (
    Conflict,
    HostError,
    HostFault,
    HostFull,
    HostUnavailable,
    InvalidRequest,
)
from hostruntime.host import kernel
from hostruntime.host.paths import MAX_SLOTS, Instance, StatePaths, read_json, write_atomically
from hostruntime.host.patience import scaled
from hostruntime.host.rundir import RunDir
from hostruntime.host.tasks import log_errors
from hostruntime.network import firewall, nowhere
from hostruntime.network.conntrack import forget_connections
from hostruntime.network.direct import Listener, record_attempt
from hostruntime.network.firewall_watch import FirewallWatch
from hostruntime.network.netns import (
    Link,
    destroy_namespace,
    make_namespace,
    namespace_alive,
    run_ip,
    write_sysctl,
)
from hostruntime.network.policy import MODES, Mode, Policy
from hostruntime.network.settings import NetworkSettings
from hostruntime.network.stub_resolver import StubResolver

PROXY_GROUP = "proxy"
# How many namespaces wait, made, for a container of each mode.
READY: Mapping[Mode, int] = {"off": 8, "restricted": 6, "open": 4}
# An owner's name becomes a file's.
_OWNER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_SLOTS_PER_OCTET = 128
_WAIT_FOR_RECYCLING_SECONDS = 3.0
_PAUSE_AFTER_FAILURE_SECONDS = 1.0
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Slot:
    """One place: `id_base` is the host id of container root; `netns`, `sysfs` are mounted."""

    index: int
    mode: Mode
    id_base: int
    netns: Path | None
    sysfs: Path | None
    address: str | None


class SlotPool:
    """The slots of one instance. Thread-safe; every method may block on the kernel."""

    def __init__(
        self, paths: StatePaths, instance: Instance, settings: NetworkSettings | None = None
    ) -> None:
        self.paths = paths
        self.instance = instance
        self.settings = settings or NetworkSettings.from_environment()
        self.run_dir = RunDir.of(instance)
        self.firewall = FirewallWatch(self._firewall_plan())
        self.resolver = StubResolver()
        self._changed = threading.Condition()
        self._free: deque[int] = deque(range(MAX_SLOTS))
        self._ready: dict[Mode, deque[Slot]] = {mode: deque() for mode in MODES}
        self._assigned: dict[str, Slot] = {}
        self._doomed: deque[Slot] = deque()
        self._attempts = threading.Lock()
        # Who has, or was the last to have, a slot without a free way out that is not free yet.
        self._held: dict[Slot, str] = {}
        self._recycler: threading.Thread | None = None
        self._closing = False
        self._busy = 0
        self._waiting = 0

    # Life of the pool ---------------------------------------------------------------------

    def setup(self) -> None:
        """Put in place what all slots share; idempotent. Raises OSError or HostError."""
        self.run_dir.ensure(_proxy_gid())
        self.firewall.install()
        run_ip([f"address replace {self._proxy()}/32 dev lo label lo:{self.instance.prefix}px"])
        # Networked slots with mode open need it, and only packets of theirs are let through by
        # our own table; what else the host forwards from now on is its other tables' business.
        write_sysctl("net/ipv4/ip_forward", "1")

    def reclaim(self, live_owners: set[str]) -> None:
        """Take up the slots of `live_owners`, destroy all others, and begin making ready ones.

        For the agent's start, after :meth:`setup`; later calls only release what is not live.
        """
        if self._recycler is not None:
            for owner in set(self._assigned) - live_owners:
                self.release(owner)
            return
        for slot, owner in self._recorded():
            if owner in live_owners and self._whole(slot):
                self._adopt(owner, slot)
        self._destroy_leftovers(kept=set(self._assigned.values()))
        self._closing = False
        self._recycler = threading.Thread(target=self._recycle, name="slots", daemon=True)
        self._recycler.start()

    def close(self) -> None:
        """Stop making namespaces ready; those in use stay. For the agent's own end."""
        with self._changed:
            self._closing = True
            recycler, self._recycler = self._recycler, None
            self._changed.notify_all()
        if recycler is not None:
            recycler.join()
        self.resolver.close()

    def teardown(self) -> None:
        """Remove every namespace, interface, address, rule and file of the instance.

        The egress proxy must have been stopped. Raises OSError or HostError.
        """
        self.close()
        self._destroy_leftovers(kept=set())
        run_ip_quietly([f"address delete {self._proxy()}/32 dev lo"])
        firewall.remove(self.instance.nft_table)
        if left := kernel.mount_points_under(self.run_dir.root):
            raise HostFault(f"{left[0]} is still mounted; unmount it and try again.")
        shutil.rmtree(self.run_dir.root, ignore_errors=True)
        self._free = deque(range(MAX_SLOTS))
        self._ready = {mode: deque() for mode in MODES}
        self._assigned.clear()
        self._doomed.clear()

    # Slots --------------------------------------------------------------------------------

    def acquire(self, owner: str, policy: Policy) -> Slot:
        """Give `owner` a slot in which `policy` is already in force.

        Raises HostFull when all slots are taken, Conflict when the owner has one, InvalidRequest
        for an owner's name that could not be a file's, HostUnavailable while there is no firewall,
        HostError or OSError when the policy cannot be put in force (the owner then has no slot).
        """
        if not _OWNER.fullmatch(owner):
            raise InvalidRequest(f"{owner!r} cannot own a slot: letters, digits, . _ - only.")
        slot = self._take(owner, policy.mode)
        try:
            self._enforce(owner, slot, policy)
        except BaseException:
            self.release(owner)
            raise
        return slot

    def release(self, owner: str) -> None:
        """Take the owner's slot back: no policy at once, the namespace soon; idempotent."""
        with self._changed:
            slot = self._assigned.pop(owner, None)
        if slot is None:
            return
        self._withdraw(slot)
        with self._changed:
            self._doomed.append(slot)
            self._changed.notify_all()
        if self._recycler is None:
            self._destroy_doomed()

    def slot_of(self, owner: str) -> Slot | None:
        """Return the owner's slot, if it has one."""
        with self._changed:
            return self._assigned.get(owner)

    def ready(self) -> dict[Mode, int]:
        """Return how many namespaces wait, made, per mode."""
        with self._changed:
            return {mode: len(slots) for mode, slots in self._ready.items()}

    def settle(self, timeout: float) -> bool:
        """Wait until nothing is left to recycle or make ready; False after `timeout` seconds."""
        with self._changed:
            return self._changed.wait_for(self._settled, timeout)

    def proxy_address(self) -> tuple[str, int]:
        """Return where restricted containers find the egress proxy."""
        return str(self._proxy()), firewall.PROXY_PORT

    def record_attempts(self, reader: str | None = None) -> None:
        """Have what containers tried past the proxy, or without one, in their owners' records.

        ``reader`` is whose record is to be read, if only one's. To be called every few seconds
        without one, for the firewall forgets (not so a slot that is off), and in a thread.
        """
        held = self._held.copy()
        modes = {slot.mode for slot, owner in held.items() if owner == reader}
        if reader is None or "restricted" in modes:
            self._record_restricted()
        for slot, owner in held.items():
            if slot.mode == "off" and owner == reader:
                self._record_off(slot, owner)

    def _record_restricted(self) -> None:
        with self._attempts:
            try:
                found = firewall.take_attempts(self.instance.nft_table)
            except (HostError, OSError) as error:
                _log.warning("what went past the proxy cannot be read: %s", error)
                return
            owners = {slot.address: owner for slot, owner in self._held.copy().items()}
            for attempt in found:
                if (owner := owners.get(attempt.source)) is not None:
                    record_attempt(self.run_dir, owner, "restricted", attempt)

    def _record_off(self, slot: Slot, owner: str) -> None:
        with self._attempts:
            # Meanwhile it may be gone, and what was tried in it recorded.
            if slot.netns is None or self._held.get(slot) != owner:
                return
            try:
                found = nowhere.take_attempts(slot.netns)
            except (HostError, OSError) as error:
                _log.warning("what was tried in slot %d cannot be read: %s", slot.index, error)
                return
            for attempt in found:
                record_attempt(self.run_dir, owner, "off", attempt)

    # Taking -------------------------------------------------------------------------------

    def _take(self, owner: str, mode: Mode) -> Slot:
        with self._changed:
            if owner in self._assigned:
                raise Conflict(f"{owner} already has a network slot.")
            slot = self._ready[mode].popleft() if self._ready[mode] else None
            if slot is not None:
                self._assigned[owner] = slot
                self._changed.notify_all()
                return slot
            slot = self._slot(self._any_index(), mode)
            self._assigned[owner] = slot
        try:
            self._make(slot)
        except BaseException:
            with self._changed:
                del self._assigned[owner]
                self._free.append(slot.index)
            raise
        return slot

    def _any_index(self) -> int:
        """Return a free index, at the cost of another mode's ready slot if need be."""
        deadline = time.monotonic() + scaled(_WAIT_FOR_RECYCLING_SECONDS)
        self._waiting += 1
        try:
            while not self._free:
                self._sacrifice_a_ready_slot()
                more_to_come = bool(self._doomed) or self._busy > 0
                if not more_to_come or not self._changed.wait(deadline - time.monotonic()):
                    raise HostFull("All network slots of this host are taken; try again shortly.")
            return self._free.popleft()
        finally:
            self._waiting -= 1
            self._changed.notify_all()

    def _sacrifice_a_ready_slot(self) -> None:
        ready = max(self._ready.values(), key=len)
        if ready and not self._doomed:
            self._doomed.append(ready.pop())
            self._changed.notify_all()

    def _enforce(self, owner: str, slot: Slot, policy: Policy) -> None:
        if slot.address is not None:
            self.firewall.ensure_there()
        if slot.mode != "open":
            self._held[slot] = owner
        if slot.address is not None and policy.mode == "restricted":
            entry = {"owner": owner, "domains": policy.allow_domains}
            _write_small(self._entry(slot), entry, mode=0o640)
        _write_small(self._record(slot), {"index": slot.index, "mode": slot.mode, "owner": owner})

    def _withdraw(self, slot: Slot) -> None:
        if slot.address is not None:
            self._entry(slot).unlink(missing_ok=True)
        self._record(slot).unlink(missing_ok=True)

    # Recycling ----------------------------------------------------------------------------

    def _recycle(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closing or self._next_work() is not None)
                work = None if self._closing else self._next_work()
                if work is None:
                    return
            done = False
            with log_errors("a network slot could not be recycled"):
                work()
                done = True
            if not done:
                with self._changed:
                    self._changed.wait_for(lambda: self._closing, _PAUSE_AFTER_FAILURE_SECONDS)

    def _next_work(self) -> Callable[[], None] | None:
        short = [mode for mode in MODES if len(self._ready[mode]) < READY[mode]]
        empty = [mode for mode in short if not self._ready[mode]]
        spare = bool(self._free) and not self._waiting
        if self._doomed and not (empty and spare):
            return self._destroy_doomed
        if short and spare:
            return partial(self._make_ready, (empty or short)[0])
        return None

    def _settled(self) -> bool:
        return self._next_work() is None and self._busy == 0

    def _make_ready(self, mode: Mode) -> None:
        with self._at_work(self._free) as index:
            if index is not None:
                slot = self._slot(index, mode)
                self._make(slot)
                with self._changed:
                    self._ready[mode].append(slot)

    def _destroy_doomed(self) -> None:
        with self._at_work(self._doomed) as slot:
            if slot is not None:
                self._destroy(slot)
                with self._changed:
                    self._free.append(slot.index)

    @contextmanager
    def _at_work[T](self, queue: deque[T]) -> Iterator[T | None]:
        """Take the first item of a queue (None if empty); put it back if the work fails."""
        with self._changed:
            item = queue.popleft() if queue else None
            self._busy += 1
        try:
            yield item
        except BaseException:
            with self._changed:
                if item is not None:
                    queue.append(item)
            raise
        finally:
            with self._changed:
                self._busy -= 1
                self._changed.notify_all()

    def _make(self, slot: Slot) -> None:
        make_namespace(self.run_dir, self._name(slot.index), self._link(slot))
        self._attend(slot)

    def _adopt(self, owner: str, slot: Slot) -> None:
        """Take up what an earlier agent has left to a container that lives."""
        self._assigned[owner] = slot
        self._free.remove(slot.index)
        self._attend(slot)
        if slot.mode != "open":
            self._held[slot] = owner
        link = self._link(slot)
        if link is not None and slot.mode == "restricted":
            # Turning the host's own on, as we do, turns every interface's on.
            write_sysctl(f"net/ipv4/conf/{link.host_end}/forwarding", "0", optional=True)

    def _attend(self, slot: Slot) -> None:
        """Have the names heard of that a container asks DNS for which has none, and addresses."""
        if slot.mode == "open" or slot.netns is None:
            return
        if slot.mode == "off":
            try:
                nowhere.lead_nowhere(slot.netns)
            except (HostError, OSError) as error:
                # What its programs try fails as well, and nobody is told.
                _log.warning("nothing is heard of what slot %d tries: %s", slot.index, error)
        listener = Listener(self.run_dir, slot.mode, slot.address, partial(self._owner_of, slot))
        try:
            self.resolver.attend(slot.netns, listener.hear)
        except OSError as error:
            # Its programs are told as before that there is no resolver, and nobody why.
            _log.warning("no names are heard of in slot %d: %s", slot.index, error)

    def _owner_of(self, slot: Slot) -> str | None:
        with self._changed:
            found = (owner for owner, taken in self._assigned.items() if taken == slot)
            return next(found, None)

    def _destroy(self, slot: Slot) -> None:
        link = self._link(slot)
        if slot.netns is not None:
            self.resolver.leave(slot.netns)
        if (owner := self._held.get(slot)) is not None:
            # Before somebody else gets it.
            self.record_attempts(owner)
            self._held.pop(slot, None)
        destroy_namespace(self.run_dir, self._name(slot.index), link.host_end if link else None)
        if slot.mode == "open" and slot.address is not None:
            forget_connections(IPv4Address(slot.address))

    # Leftovers ----------------------------------------------------------------------------

    def _recorded(self) -> list[tuple[Slot, str]]:
        found: list[tuple[Slot, str]] = []
        for path in sorted(self.run_dir.slots.glob("*.json")):
            record = read_json(path) or {}
            index, mode, owner = record.get("index"), record.get("mode"), record.get("owner")
            if isinstance(index, int) and 0 <= index < MAX_SLOTS and isinstance(owner, str):
                found += [(self._slot(index, known), owner) for known in MODES if known == mode]
        return found

    def _whole(self, slot: Slot) -> bool:
        # A restricted slot without its entry would be cut off, not let loose; but say so early.
        entry_needed = slot.mode == "restricted"
        return namespace_alive(self.run_dir, self._name(slot.index)) and (
            not entry_needed or self._entry(slot).exists()
        )

    def _destroy_leftovers(self, kept: set[Slot]) -> None:
        indexes = {slot.index for slot in kept}
        names = {self._name(index) for index in indexes}
        addresses = {slot.address for slot in kept}
        for path in (*_listing(self.run_dir.netns), *_listing(self.run_dir.sysfs)):
            if path.name not in names:
                destroy_namespace(self.run_dir, path.name, None)
        links = {link.host_end for slot in kept if (link := self._link(slot)) is not None}
        for name in interfaces_named(self.instance.prefix):
            if name not in links:
                run_ip_quietly([f"link delete {name}"])
        for path in _listing(self.run_dir.slots):
            if path.stem not in {str(index) for index in indexes}:
                path.unlink(missing_ok=True)
        for path in _listing(self.run_dir.entries):
            if path.stem not in addresses:
                path.unlink(missing_ok=True)

    # Names and addresses ------------------------------------------------------------------

    def _slot(self, index: int, mode: Mode) -> Slot:
        name = self._name(index)
        return Slot(
            index=index,
            mode=mode,
            id_base=self.instance.slot_id_base(index),
            netns=self.run_dir.netns / name,
            sysfs=self.run_dir.sysfs / name,
            address=self._address(index, mode),
        )

    def _address(self, index: int, mode: Mode) -> str | None:
        if mode == "off":
            return None
        block = self._block(mode)
        octet, rest = divmod(index, _SLOTS_PER_OCTET)
        return str(block.network_address + (octet << 8) + rest + 1)

    def _block(self, mode: Mode) -> IPv4Network:
        blocks = list(self.instance.subnet.subnets(new_prefix=18))
        return blocks[1] if mode == "restricted" else blocks[2]

    def _link(self, slot: Slot) -> Link | None:
        if slot.address is None:
            return None
        return Link(
            host_end=f"{self.instance.prefix}{slot.mode[0]}{slot.index}",
            address=IPv4Address(slot.address),
            gateway=self._proxy(),
            # So that what a restricted one tries is seen here; nothing of it is let through.
            forwarded=slot.mode == "open",
        )

    def _name(self, index: int) -> str:
        return self.instance.slot_name(index)

    def _proxy(self) -> IPv4Address:
        return self.instance.subnet.network_address + 1

    def _entry(self, slot: Slot) -> Path:
        return self.run_dir.entries / f"{slot.address}.json"

    def _record(self, slot: Slot) -> Path:
        return self.run_dir.slots / f"{slot.index}.json"

    def _firewall_plan(self) -> firewall.FirewallPlan:
        return firewall.FirewallPlan(
            table=self.instance.nft_table,
            prefix=self.instance.prefix,
            proxy=self._proxy(),
            proxy_port=firewall.PROXY_PORT,
            restricted=self._block("restricted"),
            open=self._block("open"),
            resolvers=self.settings.resolvers,
            denied=self.settings.denied,
            permitted=self.settings.permitted,
            mark=firewall.proxy_mark(self.instance.index),
        )


def run_ip_quietly(commands: list[str]) -> None:
    """Run `ip -batch`, taking for done what is already gone."""
    try:
        run_ip(commands)
    except HostError as error:
        _log.debug("ignored: %s", error)


def interfaces_named(prefix: str) -> list[str]:
    """Return the interfaces of the calling thread's namespace whose names start so."""
    return [name for _, name in socket.if_nameindex() if name.startswith(prefix)]


def _listing(directory: Path) -> list[Path]:
    return sorted(directory.iterdir()) if directory.is_dir() else []


def _proxy_gid() -> int:
    try:
        return grp.getgrnam(PROXY_GROUP).gr_gid
    except KeyError:
        text = f"This machine has no group {PROXY_GROUP}; install squid-openssl."
        raise HostUnavailable(text) from None


def _write_small(path: Path, record: Mapping[str, object], mode: int = 0o600) -> None:
    write_atomically(path, json.dumps(record).encode() + b"\n", mode)

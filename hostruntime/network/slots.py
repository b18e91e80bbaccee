"""Slots: a container's place on the network, with its policy in force before it starts.

A slot is an index 0..2047 and what is derived from it: a range of host ids, a network namespace
and, unless the mode is `off`, an address. Namespaces are created in advance, per mode, in the
background, so acquiring one only writes two small files: the assignment, and the egress proxy's
allowlist. Everything else about a mode is in the instance's single nftables table
(:mod:`hostruntime.network.firewall`). A released namespace is destroyed, never reused.
"""

from __future__ import annotations

import grp
import json
import logging
import os
import re
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
    HostFull,
    HostUnavailable,
    InvalidRequest,
)
from hostruntime.host.ids import MAX_SLOTS
from hostruntime.host.paths import Instance, StatePaths, read_json
from hostruntime.host.patience import scaled
from hostruntime.host.rundir import RunDir
from hostruntime.host.tasks import log_errors
from hostruntime.host.writing import write_atomically
from hostruntime.network import blackhole, firewall
from hostruntime.network.conntrack import forget_connections
from hostruntime.network.direct import QueryRecorder, record_attempt
from hostruntime.network.firewall_watch import FirewallWatch
from hostruntime.network.netns import (
    Link,
    connect_link,
    create_namespace,
    delete_links_except,
    destroy_namespace,
    disconnect_link,
    namespace_is_mounted,
    run_in_namespace,
    run_ip,
    run_ip_ignoring_errors,
    write_sysctl,
)
from hostruntime.network.nft_process import NftProcess
from hostruntime.network.policy import MODES, Mode, Policy
from hostruntime.network.settings import NetworkSettings
from hostruntime.network.stub_resolver import StubResolver

PROXY_GROUP = "proxy"
# How many namespaces to keep ready for each mode.
READY_SLOTS: Mapping[Mode, int] = {"off": 8, "restricted": 6, "open": 4}
# An owner's name is used as a file name.
_OWNER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_SLOTS_PER_OCTET = 128
_WAIT_FOR_RECYCLING_SECONDS = 3.0
_PAUSE_AFTER_FAILURE_SECONDS = 1.0
_RECYCLER_NICE = 10
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Slot:
    """A slot; `id_base` is the host id of container root, `netns` and `sysfs` are mounted.

    The starting container takes over the sysfs, which is then only mounted in it.
    """

    index: int
    mode: Mode
    id_base: int
    netns: Path | None
    sysfs: Path | None
    address: str | None


class SlotPool:
    """The slots of one instance. Thread-safe; every method may block on the kernel."""

    def __init__(
        self,
        paths: StatePaths,
        instance: Instance,
        settings: NetworkSettings | None = None,
        slots: int = MAX_SLOTS,
    ) -> None:
        self.paths = paths
        self.instance = instance
        self.settings = settings or NetworkSettings.from_environment()
        self.run_dir = RunDir.of(instance)
        self.firewall = FirewallWatch(self._firewall_plan())
        self.resolver = StubResolver()
        self.nft = NftProcess(paths.root / "nft.log")
        self._changed = threading.Condition()
        self._slots = slots
        self._free: deque[int] = deque(range(slots))
        self._ready: dict[Mode, deque[Slot]] = {mode: deque() for mode in MODES}
        self._assigned: dict[str, Slot] = {}
        self._to_destroy: deque[Slot] = deque()
        self._attempts = threading.Lock()
        # The current or last owner of each slot that is not mode open and not yet destroyed.
        self._last_owners: dict[Slot, str] = {}
        self._disconnected: set[Slot] = set()
        self._recycler: threading.Thread | None = None
        self._closing = False
        self._busy = 0
        self._waiting = 0

    # Lifecycle ----------------------------------------------------------------------------

    def setup(self) -> None:
        """Set up what all slots share; idempotent. Raises OSError or HostError."""
        self.run_dir.ensure(_proxy_gid())
        self.firewall.install()
        run_ip([f"address replace {self._proxy()}/32 dev lo label lo:{self.instance.prefix}px"])
        # Slots with mode open need this. Our own table only forwards their packets; anything else
        # the host forwards from now on is up to its other tables.
        write_sysctl("net/ipv4/ip_forward", "1")

    def reclaim(self, live_owners: set[str]) -> None:
        """Adopt the slots of `live_owners`, destroy all others, and start the recycler.

        Called when the agent starts, after :meth:`setup`; later calls only release other owners'
        slots.
        """
        if self._recycler is not None:
            for owner in set(self._assigned) - live_owners:
                self.release(owner)
            return
        for slot, owner in self._recorded_slots():
            if owner in live_owners and self._is_intact(slot):
                self._adopt(owner, slot)
        kept = set(self._assigned.values())
        taken = {slot.index for slot in kept}
        self._free = deque(index for index in range(self._slots) if index not in taken)
        self._destroy_leftovers(keep=kept)
        self._closing = False
        self._recycler = threading.Thread(target=self._recycle, name="slots", daemon=True)
        self._recycler.start()

    def close(self) -> None:
        """Stop the recycler, but keep namespaces in use; called when the agent shuts down."""
        with self._changed:
            self._closing = True
            recycler, self._recycler = self._recycler, None
            self._changed.notify_all()
        if recycler is not None:
            recycler.join()
        self.resolver.close()
        self.nft.close()

    def teardown(self) -> None:
        """Remove every namespace, interface, address, rule and file of the instance.

        The egress proxy must have been stopped. Raises OSError or HostError.
        """
        self.close()
        self._destroy_leftovers(keep=set())
        run_ip_ignoring_errors([f"address delete {self._proxy()}/32 dev lo"])
        firewall.remove(self.instance.nft_table)
        self.run_dir.remove()
        self._free = deque(range(self._slots))
        self._ready = {mode: deque() for mode in MODES}
        self._assigned.clear()
        self._to_destroy.clear()

    # Slots --------------------------------------------------------------------------------

    def acquire(self, owner: str, policy: Policy) -> Slot:
        """Assign `owner` a slot in which `policy` is already in force.

        Raises HostFull if all slots are in use, Conflict if the owner has one, InvalidRequest if
        the owner's name is not a valid file name, HostUnavailable while there is no firewall,
        HostError or OSError if the policy cannot be enforced (the owner then has no slot).
        """
        if not _OWNER.fullmatch(owner):
            raise InvalidRequest(f"{owner!r} cannot own a slot: letters, digits, . _ - only.")
        slot = self._claim(owner, policy.mode)
        try:
            self._enforce(owner, slot, policy)
        except BaseException:
            self.release(owner)
            raise
        return slot

    def reassign(self, owner: str, new_owner: str, policy: Policy) -> Slot:
        """Give `owner`'s slot to `new_owner`, with `policy` in force; the mode stays the same.

        Raises Conflict if the new owner has a slot or the mode differs, and whatever
        :meth:`acquire` does; then the new owner has none, and the other's is released.
        """
        if not _OWNER.fullmatch(new_owner):
            raise InvalidRequest(f"{new_owner!r} cannot own a slot: letters, digits, . _ - only.")
        with self._changed:
            slot = self._assigned.get(owner)
            if slot is None or slot.mode != policy.mode or new_owner in self._assigned:
                raise Conflict(f"The network slot of {owner} cannot become that of {new_owner}.")
            self._assigned[new_owner] = self._assigned.pop(owner)
        try:
            self._enforce(new_owner, slot, policy)
            self._connect(slot)
        except BaseException:
            self.release(new_owner)
            raise
        return slot

    def disconnect(self, owner: str) -> None:
        """Let nothing reach the owner's slot, nor leave it, until reassigned.  Raises OSError."""
        with self._changed:
            slot = self._assigned[owner]
            self._disconnected.add(slot)
            # Nothing is recorded of it meanwhile.
            self._last_owners.pop(slot, None)
        if (link := self.link(slot)) is not None:
            disconnect_link(link)

    def _connect(self, slot: Slot) -> None:
        """Undo :meth:`disconnect`."""
        if slot in self._disconnected and (link := self.link(slot)) is not None:
            connect_link(link)
        self._disconnected.discard(slot)

    def release(self, owner: str) -> None:
        """Release the owner's slot: removes its policy now, its namespace soon; idempotent."""
        with self._changed:
            slot = self._assigned.pop(owner, None)
        if slot is None:
            return
        self._disconnected.discard(slot)
        self._remove_policy(slot)
        with self._changed:
            self._to_destroy.append(slot)
            self._changed.notify_all()
        if self._recycler is None:
            self._destroy_next()

    def slot_of(self, owner: str) -> Slot | None:
        """Return the owner's slot, if any."""
        with self._changed:
            return self._assigned.get(owner)

    def ready(self) -> dict[Mode, int]:
        """Return how many namespaces are ready, per mode."""
        with self._changed:
            return {mode: len(slots) for mode, slots in self._ready.items()}

    def wait_until_idle(self, timeout: float) -> bool:
        """Wait until the recycler has nothing left to do; False after `timeout` seconds."""
        with self._changed:
            return self._changed.wait_for(self._is_idle, timeout)

    def proxy_address(self) -> tuple[str, int]:
        """Return the egress proxy's address and port."""
        return str(self._proxy()), firewall.PROXY_PORT

    def record_attempts(self, only_owner: str | None = None) -> None:
        """Record containers' direct connection attempts in their owners' logs.

        ``only_owner`` is the owner whose log is about to be read, if only one. Call this every few
        seconds without one, in a thread, as the firewall forgets (slots that are off do not).
        """
        owners_by_slot = self._last_owners.copy()
        modes = {slot.mode for slot, owner in owners_by_slot.items() if owner == only_owner}
        if only_owner is None or "restricted" in modes:
            self._record_restricted()
        for slot, owner in owners_by_slot.items():
            if slot.mode == "off" and owner == only_owner:
                self._record_off(slot, owner)

    def _record_restricted(self) -> None:
        with self._attempts:
            try:
                found = firewall.drain_attempts(self.instance.nft_table)
            except (HostError, OSError) as error:
                _log.warning("attempts to bypass the proxy cannot be read: %s", error)
                return
            owners = {slot.address: owner for slot, owner in self._last_owners.copy().items()}
            for attempt in found:
                if (owner := owners.get(attempt.source)) is not None:
                    record_attempt(self.run_dir, owner, "restricted", attempt)

    def _record_off(self, slot: Slot, owner: str) -> None:
        with self._attempts:
            # It may have been destroyed meanwhile, after its attempts were recorded.
            if slot.netns is None or self._last_owners.get(slot) != owner:
                return
            try:
                found = blackhole.drain_attempts(slot.netns)
            except (HostError, OSError) as error:
                _log.warning("attempts in slot %d cannot be read: %s", slot.index, error)
                return
            for attempt in found:
                record_attempt(self.run_dir, owner, "off", attempt)

    # Acquiring ----------------------------------------------------------------------------

    def _claim(self, owner: str, mode: Mode) -> Slot:
        with self._changed:
            if owner in self._assigned:
                raise Conflict(f"{owner} already has a network slot.")
            slot = self._ready[mode].popleft() if self._ready[mode] else None
            if slot is not None:
                self._assigned[owner] = slot
                self._changed.notify_all()
                return slot
            slot = self._slot(self._claim_index(), mode)
            self._assigned[owner] = slot
        try:
            self._create(slot)
        except BaseException:
            with self._changed:
                del self._assigned[owner]
                self._free.append(slot.index)
            raise
        return slot

    def _claim_index(self) -> int:
        """Return a free index, evicting another mode's ready slot if necessary."""
        deadline = time.monotonic() + scaled(_WAIT_FOR_RECYCLING_SECONDS)
        self._waiting += 1
        try:
            while not self._free:
                self._evict_ready_slot()
                more_to_come = bool(self._to_destroy) or self._busy > 0
                if not more_to_come or not self._changed.wait(deadline - time.monotonic()):
                    raise HostFull("All network slots of this host are taken; try again shortly.")
            return self._free.popleft()
        finally:
            self._waiting -= 1
            self._changed.notify_all()

    def _evict_ready_slot(self) -> None:
        ready = max(self._ready.values(), key=len)
        if ready and not self._to_destroy:
            self._to_destroy.append(ready.pop())
            self._changed.notify_all()

    def _enforce(self, owner: str, slot: Slot, policy: Policy) -> None:
        if slot.address is not None:
            self.firewall.ensure_present()
        if slot.mode != "open":
            self._last_owners[slot] = owner
        if slot.address is not None and policy.mode == "restricted":
            entry = {"owner": owner, "domains": policy.allow_domains}
            _write_record(self._entry(slot), entry, mode=0o640)
        _write_record(self._record(slot), {"index": slot.index, "mode": slot.mode, "owner": owner})

    def _remove_policy(self, slot: Slot) -> None:
        if slot.address is not None:
            self._entry(slot).unlink(missing_ok=True)
        self._record(slot).unlink(missing_ok=True)

    # Recycling ----------------------------------------------------------------------------

    def _recycle(self) -> None:
        # Nobody waits for it: whoever finds no namespace ready creates one (setpriority(2)).
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _RECYCLER_NICE)
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closing or self._next_task() is not None)
                task = None if self._closing else self._next_task()
                if task is None:
                    return
            succeeded = False
            with log_errors("a network slot could not be recycled"):
                task()
                succeeded = True
            if not succeeded:
                with self._changed:
                    self._changed.wait_for(lambda: self._closing, _PAUSE_AFTER_FAILURE_SECONDS)

    def _next_task(self) -> Callable[[], None] | None:
        short = [mode for mode in MODES if len(self._ready[mode]) < READY_SLOTS[mode]]
        empty = [mode for mode in short if not self._ready[mode]]
        spare = bool(self._free) and not self._waiting
        if self._to_destroy and not (empty and spare):
            return self._destroy_next
        if short and spare:
            return partial(self._create_ready, (empty or short)[0])
        return None

    def _is_idle(self) -> bool:
        return self._next_task() is None and self._busy == 0

    def _create_ready(self, mode: Mode) -> None:
        with self._working_on(self._free) as index:
            if index is not None:
                slot = self._slot(index, mode)
                self._create(slot)
                with self._changed:
                    self._ready[mode].append(slot)

    def _destroy_next(self) -> None:
        with self._working_on(self._to_destroy) as slot:
            if slot is not None:
                self._destroy(slot)
                with self._changed:
                    self._free.append(slot.index)

    @contextmanager
    def _working_on[T](self, queue: deque[T]) -> Iterator[T | None]:
        """Pop the first item of a queue (None if empty); put it back if the body raises."""
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

    def _create(self, slot: Slot) -> None:
        name, link = self._name(slot.index), self.link(slot)
        try:
            create_namespace(self.run_dir, name, link, partial(self._start_recording, slot))
        except BaseException:
            if slot.netns is not None:
                self.resolver.remove(slot.netns)
            raise

    def _adopt(self, owner: str, slot: Slot) -> None:
        """Adopt the slot of a running container from an earlier agent."""
        self._assigned[owner] = slot
        if slot.netns is not None and slot.mode != "open":
            run_in_namespace(slot.netns, partial(self._start_recording, slot))
        if slot.mode != "open":
            self._last_owners[slot] = owner
        link = self.link(slot)
        if link is not None and slot.mode == "restricted":
            # Enabling ip_forward, as setup does, enables it on every interface.
            write_sysctl(f"net/ipv4/conf/{link.host_end}/forwarding", "0", optional=True)

    def _start_recording(self, slot: Slot) -> None:
        """Start recording a container's DNS queries and connection attempts, unless mode open.

        In a thread that is in its namespace.
        """
        if slot.mode == "open" or slot.netns is None:
            return
        if slot.mode == "off":
            try:
                blackhole.install_blackhole(self.nft)
            except (HostError, OSError) as error:
                # Its programs' connections fail anyway; they are just not recorded.
                _log.warning("attempts in slot %d are not recorded: %s", slot.index, error)
        recorder = QueryRecorder(
            self.run_dir, slot.mode, slot.address, partial(self._owner_of, slot)
        )
        try:
            self.resolver.add(slot.netns, recorder.record)
        except OSError as error:
            # Its programs find no resolver, and their queries are not recorded.
            _log.warning("DNS queries in slot %d are not recorded: %s", slot.index, error)

    def _owner_of(self, slot: Slot) -> str | None:
        with self._changed:
            owner = self._last_owners.get(slot)
            return owner if owner is not None and self._assigned.get(owner) == slot else None

    def _destroy(self, slot: Slot) -> None:
        link = self.link(slot)
        if slot.netns is not None:
            self.resolver.remove(slot.netns)
        if (owner := self._last_owners.get(slot)) is not None:
            # Before another owner gets it.
            self.record_attempts(owner)
            self._last_owners.pop(slot, None)
        destroy_namespace(self.run_dir, self._name(slot.index), link.host_end if link else None)
        if slot.mode == "open" and slot.address is not None:
            forget_connections(IPv4Address(slot.address))

    # Leftovers ----------------------------------------------------------------------------

    def _recorded_slots(self) -> list[tuple[Slot, str]]:
        found: list[tuple[Slot, str]] = []
        for path in sorted(self.run_dir.slots.glob("*.json")):
            record = read_json(path) or {}
            index, mode, owner = record.get("index"), record.get("mode"), record.get("owner")
            if isinstance(index, int) and 0 <= index < MAX_SLOTS and isinstance(owner, str):
                found += [(self._slot(index, known), owner) for known in MODES if known == mode]
        return found

    def _is_intact(self, slot: Slot) -> bool:
        # A restricted slot without its entry has no access, which is safe; but fail early.
        entry_needed = slot.mode == "restricted"
        return namespace_is_mounted(self.run_dir, self._name(slot.index)) and (
            not entry_needed or self._entry(slot).exists()
        )

    def _destroy_leftovers(self, keep: set[Slot]) -> None:
        indexes = {slot.index for slot in keep}
        names = {self._name(index) for index in indexes}
        addresses = {slot.address for slot in keep}
        for path in (*_listing(self.run_dir.netns), *_listing(self.run_dir.sysfs)):
            if path.name not in names:
                destroy_namespace(self.run_dir, path.name, None)
        links = {link.host_end for slot in keep if (link := self.link(slot)) is not None}
        delete_links_except(self.instance.prefix, links)
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

    def link(self, slot: Slot) -> Link | None:
        """A slot's interface; restricted ones have it so that their attempts are seen."""
        if slot.address is None:
            return None
        return Link(
            host_end=f"{self.instance.prefix}{slot.mode[0]}{slot.index}",
            address=IPv4Address(slot.address),
            gateway=self._proxy(),
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


def _listing(directory: Path) -> list[Path]:
    return sorted(directory.iterdir()) if directory.is_dir() else []


def _proxy_gid() -> int:
    try:
        return grp.getgrnam(PROXY_GROUP).gr_gid
    except KeyError:
        text = f"This machine has no group {PROXY_GROUP}; install squid-openssl."
        raise HostUnavailable(text) from None


def _write_record(path: Path, record: Mapping[str, object], mode: int = 0o600) -> None:
    write_atomically(path, json.dumps(record).encode() + b"\n", mode)

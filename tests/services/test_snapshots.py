"""Snapshots: the cap under a race, and what the minute's pass puts right."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
from django.db import connection

from hostruntime.sandbox.snapshots import RECONCILE_AGE_SECONDS
from hostruntime.wire.sandboxes import SnapshotInfo
from orkestr_console.accounts.actor import Actor, system_actor
from orkestr_console.accounts.models import Plan, Team
from orkestr_console.core.errors import Conflict
from sandboxes_app import services, tasks
from sandboxes_app.models import Sandbox, Snapshot
from sandboxes_app.services.snapshots import settle_orphans
from sandboxes_app.specs import SandboxSpec, SnapshotSpec
from tests.fakes.host import FakeHost


@pytest.fixture
def sandbox(host: FakeHost, actor: Actor) -> Sandbox:
    return services.create_sandbox(actor, SandboxSpec(template="debian-12"))


# More than what the passes bear with, which is longer on a slow machine.
OLD = RECONCILE_AGE_SECONDS + 100


def aged(host: FakeHost, snapshot_id: str, seconds: float) -> None:
    """Make the host's snapshot that much older."""
    info, files = host.taken[snapshot_id]
    host.taken[snapshot_id] = (replace(info, created_at=info.created_at - seconds), files)


@pytest.mark.django_db(transaction=True)
def test_no_two_take_the_last_place(plans: None, team: Team, host: FakeHost) -> None:
    actor = system_actor(team)
    Plan.objects.filter(pk="team").update(max_named_snapshots=2)
    sandbox = services.create_sandbox(actor, SandboxSpec(template="debian-12"))
    taken, refused = list[str](), list[str]()
    begin = threading.Barrier(6)

    def take() -> None:
        begin.wait()
        try:
            taken.append(services.create_snapshot(actor, sandbox.pk, SnapshotSpec()).pk)
        except Conflict as error:
            refused.append(error.code)
        finally:
            connection.close()

    threads = [threading.Thread(target=take) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(taken) == 2
    assert refused == ["snapshot_cap_reached"] * 4
    assert services.usage_counts([team])[team.pk]["max_named_snapshots"] == 2


def test_the_last_of_the_disk_space_is_taken_once(
    host: FakeHost, actor: Actor, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each has room when it is asked for: how much one takes is known when it has been taken."""
    Plan.objects.filter(pk="team").update(snapshot_disk_mb=100)
    take, within = host.create_snapshot, list[str]()

    def take_another_meanwhile(snapshot_id: str, sandbox_id: str) -> SnapshotInfo:
        if not within:
            within.append(snapshot_id)
            within.append(services.create_snapshot(actor, sandbox.pk, SnapshotSpec()).pk)
        return take(snapshot_id, sandbox_id)

    monkeypatch.setattr(host, "create_snapshot", take_another_meanwhile)
    with pytest.raises(Conflict, match="124 of the 100 megabytes") as refused:
        services.create_snapshot(actor, sandbox.pk, SnapshotSpec())
    assert refused.value.code == "snapshot_cap_reached"
    assert list(host.taken) == [within[1]]
    failed = Snapshot.objects.get(pk=within[0])
    assert (failed.status, "delete a snapshot" in failed.error_message) == ("failed", True)
    assert services.usage_counts([actor.team])[actor.team.pk]["snapshot_disk_mb"] == 124


def test_one_that_nobody_waits_for_any_more_takes_no_more_than_there_is(
    host: FakeHost, actor: Actor, sandbox: Sandbox
) -> None:
    services.create_snapshot(actor, sandbox.pk, SnapshotSpec())
    orphan = services.create_snapshot(actor, sandbox.pk, SnapshotSpec())
    Snapshot.objects.filter(pk=orphan.pk).update(status="capturing", size_mb=None)
    Plan.objects.filter(pk="team").update(snapshot_disk_mb=100)
    settle_orphans([orphan.pk])
    orphan.refresh_from_db()
    assert orphan.status == "failed"
    assert orphan.pk not in host.taken


def test_what_no_row_names_is_set_aside_on_the_host_once_it_is_old(
    host: FakeHost, actor: Actor, sandbox: Sandbox
) -> None:
    kept = services.create_snapshot(actor, sandbox.pk, SnapshotSpec()).pk
    host.create_snapshot("snap_young", sandbox.pk)
    host.create_snapshot("snap_old", sandbox.pk)
    aged(host, kept, OLD)
    aged(host, "snap_old", OLD)
    tasks.tidy()
    assert set(host.taken) == {kept, "snap_young"}
    assert [held.key for held in host.quarantine()] == ["snapshot.snap_old"]


def test_a_deleted_one_that_the_host_kept_goes_with_the_next_pass(
    host: FakeHost, actor: Actor, sandbox: Sandbox
) -> None:
    snapshot = services.create_snapshot(actor, sandbox.pk, SnapshotSpec())
    host.down = True
    services.delete_snapshot(actor, snapshot.pk)
    host.down = False
    aged(host, snapshot.pk, OLD)
    tasks.tidy()
    assert host.taken == {}


def test_one_whose_files_the_host_lost_fails(
    host: FakeHost, actor: Actor, sandbox: Sandbox
) -> None:
    snapshot = services.create_snapshot(actor, sandbox.pk, SnapshotSpec())
    host.taken.clear()
    tasks.tidy()
    snapshot.refresh_from_db()
    assert (snapshot.status, snapshot.error_message != "") == ("failed", True)

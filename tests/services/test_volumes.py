"""Volumes: who gets one, what they count, and what the minute's pass puts right."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta

import pytest
from django.db import connection
from django.utils import timezone

from hostruntime.errors import HostFull, VolumeDamaged, VolumeInUse
from orkestr_console.accounts.actor import Actor, system_actor
from orkestr_console.accounts.models import AuditEntry, Plan, Team
from orkestr_console.core.errors import (
    Conflict,
    DomainError,
    FleetFull,
    InvalidInput,
    NotFound,
    PlanLimit,
)
from orkestr_console.http.validation import parse_spec
from orkestr_console.webhooks import services as webhooks
from orkestr_console.webhooks.models import Delivery
from orkestr_console.webhooks.specs import WebhookSpec
from sandboxes_app import services, tasks
from sandboxes_app.models import Sandbox, Volume
from sandboxes_app.presenters import sandbox_detail, volume_detail
from sandboxes_app.services import volumes
from sandboxes_app.specs import (
    BatchSpec,
    DirectorySpec,
    FileSpec,
    LifetimeSpec,
    MoveSpec,
    PresignSpec,
    RegionSpec,
    SandboxSpec,
    VolumeSpec,
)
from tests.fakes.host import FakeHost
from tests.receiving import loopback_permitted as loopback_permitted


def box(actor: Actor, volume: str | None = "data") -> Sandbox:
    return services.create_sandbox(actor, SandboxSpec(template="debian-12", volume=volume))


def only(actor: Actor) -> Volume:
    [volume] = services.list_volumes(actor)
    return volume


def refusal(actor: Actor, volume: str = "data") -> DomainError:
    before = Sandbox.objects.count()
    with pytest.raises(DomainError) as refused:
        box(actor, volume)
    # Nothing is left of the attempt.
    assert Sandbox.objects.count() == before
    return refused.value


def test_a_volume_goes_from_one_sandbox_to_the_next(host: FakeHost, actor: Actor) -> None:
    first = box(actor)
    volume = only(actor)
    assert (volume.name, volume.size_mb, volume.stored) == ("data", 10_240, True)
    assert sandbox_detail(first)["volume"] == "data"
    shown = volume_detail(volume)
    assert (shown["status"], shown["attached_sandbox_id"]) == ("attached", first.pk)
    error = refusal(actor)
    assert (error.status, error.code, error.extra) == (
        409,
        "volume_in_use",
        {"sandbox_id": first.pk},
    )
    services.pause_sandbox(actor, first.pk)
    assert refusal(actor, volume.pk).code == "volume_in_use"
    for refused in (
        lambda: services.delete_volume(actor, volume.pk),
        lambda: services.move_volume(actor, volume.pk, RegionSpec(region="local")),
    ):
        with pytest.raises(Conflict, match="terminate that first"):
            refused()
    services.terminate_sandbox(actor, first.pk)
    assert volume_detail(only(actor))["status"] == "available"
    # By its id, and it is the same; what it was called stays with the sandbox.
    second = box(actor, volume.pk)
    assert set(host.persisted) == {volume.pk}
    assert sandbox_detail(second)["volume"] == "data"
    services.terminate_sandbox(actor, second.pk)
    services.delete_volume(actor, volume.pk)
    services.delete_volume(actor, volume.pk)
    assert host.persisted == {}
    assert services.list_volumes(actor) == []
    first.refresh_from_db()
    assert sandbox_detail(first)["volume"] == "data"
    actions = AuditEntry.objects.filter(object_id=volume.pk).values_list("action", flat=True)
    # One was refused.
    assert list(actions.order_by("id")) == ["volume.create", "volume.delete", "volume.delete"]
    # The name is free again, for another one.
    box(actor)
    assert only(actor).pk != volume.pk


@pytest.mark.django_db(transaction=True)
def test_of_two_that_name_the_same_exactly_one_gets_it(
    plans: None, team: Team, host: FakeHost
) -> None:
    actor = system_actor(team)
    got, refused = list[str](), list[str]()
    begin = threading.Barrier(4)

    def create() -> None:
        begin.wait()
        try:
            got.append(box(actor).pk)
        except Conflict as error:
            refused.append(error.code)
        finally:
            connection.close()

    threads = [threading.Thread(target=create) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(got), refused) == (1, ["volume_in_use"] * 3)
    assert only(actor).holder == got[0]


def test_one_whose_sandbox_has_ended_without_a_word_is_free(host: FakeHost, actor: Actor) -> None:
    first = box(actor)
    host.end(first.pk, "exited")
    # The row does not know it yet.
    second = box(actor)
    first.refresh_from_db()
    assert (first.status, only(actor).holder) == ("failed", second.pk)


def test_a_refused_create_leaves_no_volume_and_a_lost_one_is_never_made_anew(
    host: FakeHost, actor: Actor
) -> None:
    host.full = True
    assert isinstance(refusal(actor), FleetFull)
    host.full = False
    host.volume_fails = HostFull("No room.")
    assert isinstance(refusal(actor), FleetFull)
    assert services.list_volumes(actor) == []
    host.volume_fails = None
    services.terminate_sandbox(actor, box(actor).pk)
    host.volume_fails = VolumeInUse("Somebody has it.")
    assert refusal(actor).code == "volume_in_use"
    host.volume_fails = VolumeDamaged("It is damaged: /var/lib/orkestr.")
    error = refusal(actor)
    assert error.code == "volume_damaged"
    assert "'data'" in error.detail
    assert "/var" not in error.detail
    host.volume_fails, host.persisted = None, {}
    error = refusal(actor)
    assert (error.status, error.code) == (409, "volume_lost")
    assert host.persisted == {}
    assert volume_detail(only(actor))["status"] == "lost"


def test_a_file_call_writes_to_a_volume_and_to_nothing_that_looks_like_one(
    host: FakeHost, actor: Actor
) -> None:
    file = FileSpec(path="/persist/file", content="eA==")
    assert services.write_file(actor, box(actor).pk, file) == 1
    without = box(actor, None).pk
    refused: list[Callable[[], object]] = [
        lambda: services.write_file(actor, without, file),
        lambda: services.delete_path(actor, without, "/persist/file"),
        lambda: services.mkdir(actor, without, DirectorySpec(path="/persist/d")),
        lambda: services.move(
            actor, without, MoveSpec(source="/tmp/x", destination="/persist/file")
        ),
        lambda: services.presign_upload(actor, without, PresignSpec(path="/persist/file")),
    ]
    for call in refused:
        with pytest.raises(InvalidInput, match="has no volume"):
            call()
    [row] = services.write_batch(actor, without, BatchSpec(files=[file]))
    assert row.error == "not_permitted"


def test_limits_count_volumes_and_what_they_may_grow_to(
    host: FakeHost, actor: Actor, team: Team
) -> None:
    Plan.objects.filter(pk="team").update(max_volumes=2, volume_disk_mb=12_288)
    services.create_volume(actor, VolumeSpec(name="small", size_gb=0.25))
    with pytest.raises(PlanLimit, match="this needs 13,312"):
        services.create_volume(actor, VolumeSpec(name="large", size_gb=13))
    box(actor)
    assert isinstance(refusal(actor, "third"), PlanLimit)
    used = services.usage_counts([team])[team.pk]
    assert (used["max_volumes"], used["volume_disk_mb"]) == (2, 10_496)
    with pytest.raises(Conflict, match="already") as taken:
        services.create_volume(actor, VolumeSpec(name="small"))
    assert taken.value.code == "volume_exists"


@pytest.mark.usefixtures("loopback_permitted")
def test_it_expires_when_it_is_free_and_webhooks_are_told(host: FakeHost, actor: Actor) -> None:
    webhooks.create_webhook(actor, WebhookSpec(url="http://127.0.0.1:9/"))
    spec = VolumeSpec(name="data", max_lifetime_hours=2)
    volume = services.create_volume(actor, spec)
    assert volume.expires_at == volume.created_at + timedelta(hours=2)
    changed = services.update_volume(actor, volume.pk, LifetimeSpec(max_lifetime_days=3))
    assert (changed.max_lifetime_hours, changed.max_lifetime_days) == (None, 3)
    assert changed.expires_at == volume.created_at + timedelta(days=3)
    changed = services.update_volume(actor, volume.pk, LifetimeSpec(max_lifetime_days=None))
    assert changed.expires_at is None
    sandbox = box(actor)
    Volume.objects.update(expires_at=timezone.now() - timedelta(seconds=1))
    volumes.expire_overdue()
    # Nor if it was free when the pass looked.
    assert not volumes.expire(only(actor))
    assert only(actor).pk == volume.pk
    services.terminate_sandbox(actor, sandbox.pk)
    # The host does not answer: it is deleted there by the next pass that it answers.
    host.down = True
    tasks.tidy()
    assert services.list_volumes(actor) == []
    assert set(host.persisted) == {volume.pk}
    host.down = False
    tasks.tidy()
    assert host.persisted == {}
    told = Delivery.objects.filter(event_type="volume.expired")
    assert [delivery.object_id for delivery in told] == [volume.pk]


@pytest.mark.parametrize("fields", [{}, {"max_lifetime_days": 1, "max_lifetime_hours": 1}])
def test_a_lifetime_has_one_unit(fields: dict[str, int]) -> None:
    with pytest.raises(InvalidInput, match="exactly one"):
        parse_spec(LifetimeSpec, fields)


def test_the_pass_measures_marks_lost_and_deletes_nothing_on_doubt(
    host: FakeHost, actor: Actor
) -> None:
    services.terminate_sandbox(actor, box(actor).pk)
    volume = only(actor)
    host.persisted["vol_nobodys"] = replace(host.persisted[volume.pk], id="vol_nobodys")
    tasks.tidy()
    assert only(actor).used_mb == 3
    assert "vol_nobodys" in host.persisted
    kept = host.persisted.pop(volume.pk)
    tasks.tidy()
    assert only(actor).status == "lost"
    # An operator has put it back.
    host.persisted[volume.pk] = kept
    tasks.tidy()
    assert only(actor).status == "available"


def test_another_team_sees_nothing_of_it(host: FakeHost, actor: Actor, other_actor: Actor) -> None:
    box(actor)
    volume = only(actor)
    assert services.list_volumes(other_actor) == []
    for call in (
        lambda: services.get_volume(other_actor, volume.pk),
        lambda: services.delete_volume(other_actor, volume.pk),
        lambda: box(other_actor, volume.pk),
    ):
        with pytest.raises(NotFound):
            call()
    # The same name is another volume.
    Plan.objects.update(max_volumes=5, volume_disk_mb=51_200)
    theirs = box(other_actor)
    assert theirs.volume_id not in {None, volume.pk}


def test_an_agent_that_knows_no_volumes_starts_none_without(
    host: FakeHost, actor: Actor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeHost, "attach", lambda *_: None)
    real = FakeHost.create_sandbox

    def without(self: FakeHost, request: object) -> object:
        return replace(real(self, request), volume=None)  # type: ignore[arg-type]

    monkeypatch.setattr(FakeHost, "create_sandbox", without)
    with pytest.raises(DomainError):
        box(actor)
    assert host.booted == {}
    assert Sandbox.objects.get().status == "failed"

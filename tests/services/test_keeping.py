"""Rows and the host's images: what a database that is not this state's may do, and what heals."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
from django.core.management import CommandError, call_command
from django.db import connection

from hostruntime.host.installation import InstallationMismatch
from hostruntime.wire.images import ImageInfo
from hostruntime.wire.reconciliation import Reconcile
from orkestr_console.accounts.actor import Actor
from orkestr_console.core.errors import Conflict
from orkestr_console.installation import services as installation
from orkestr_console.installation.models import Installation
from sandboxes_app import services, tasks
from sandboxes_app.models import Sandbox, Snapshot
from sandboxes_app.specs import SandboxSpec, SnapshotSpec
from templates_app.models import Template
from templates_app.services import adopt_image
from templates_app.tasks import reconcile_images
from tests.fakes.host import FakeHost
from tests.services.test_snapshots import OLD, aged


def image_like(name: str) -> ImageInfo:
    return ImageInfo(
        name,
        "template",
        base="debian-12",
        created_at=1.0,
        size_bytes=2,
        file_count=1,
        shared_bytes=1,
    )


@pytest.fixture
def image(host: FakeHost, actor: Actor) -> Template:
    """A ready template, with its image on the host; both belong together."""
    template = Template.objects.create(
        team=actor.team,
        name="one",
        base_template="debian-12",
        base_image="debian-12",
        recipe=["true"],
        status="ready",
    )
    host.stored[template.image_id] = image_like(template.image_id)
    tasks.tidy()
    assert not installation.is_mismatched()
    return template


def restored(epochs: int, host: FakeHost) -> Installation:
    """The row as a backup had it, after which the two went on together."""
    tasks.tidy()
    old = Installation.objects.get()
    for _ in range(epochs):
        tasks.tidy()
    old.save()
    return old


def a_pass() -> None:
    tasks.tidy()
    reconcile_images()


def test_a_pass_writes_a_new_mark_on_both_sides(image: Template, host: FakeHost) -> None:
    before = Installation.objects.get()
    tasks.tidy()
    row = Installation.objects.get()
    assert (row.epoch, row.previous) == (before.epoch + 1, before.mark)
    assert row.confirmed
    assert host.book.read().mark == row.mark


def test_what_no_row_names_is_set_aside_and_can_be_put_back(
    image: Template, host: FakeHost
) -> None:
    host.stored["img_unknown"] = image_like("img_unknown")
    a_pass()
    assert set(host.stored) == {image.image_id}
    assert [held.key for held in installation.list_quarantine()] == ["image.img_unknown"]
    installation.restore("image.img_unknown")
    assert set(host.stored) == {image.image_id, "img_unknown"}


def test_never_more_than_a_few_in_a_pass(image: Template, host: FakeHost) -> None:
    for number in range(8):
        host.stored[f"img_unknown{number}"] = image_like(f"img_unknown{number}")
    a_pass()
    assert len(installation.list_quarantine()) == 3
    assert Installation.objects.get().waiting == 5
    for _ in range(2):
        a_pass()
    assert len(installation.list_quarantine()) == 8
    assert Installation.objects.get().waiting == 0


@pytest.fixture(params=["empty", "older", "foreign"])
def wrong(
    request: pytest.FixtureRequest, image: Template, host: FakeHost, actor: Actor
) -> Iterator[str]:
    """Another database is beside the state: rows are gone, or those of another time."""
    sandbox = services.create_sandbox(actor, SandboxSpec(template="debian-12"))
    snapshot = services.create_snapshot(actor, sandbox.pk, SnapshotSpec()).pk
    aged(host, snapshot, OLD)
    box = host.booted[sandbox.pk]
    box.info = replace(box.info, started_at=box.info.started_at - OLD)
    if request.param == "older":
        restored(3, host)
        Snapshot.objects.all().delete()
    else:
        Installation.objects.all().delete()
        Snapshot.objects.all().delete()
        if request.param == "foreign":
            Installation.objects.create(epoch=400, confirmed=True)
    Sandbox.objects.all().delete()
    Template.objects.all().delete()
    yield str(request.param)


def test_a_database_that_is_not_this_states_sets_nothing_aside(wrong: str, host: FakeHost) -> None:
    images, snapshots, containers = set(host.stored), set(host.taken), set(host.booted)
    for _ in range(3):
        a_pass()
    assert (set(host.stored), set(host.taken), set(host.booted)) == (images, snapshots, containers)
    assert installation.list_quarantine() == []
    assert installation.is_mismatched()
    words = {"empty": "another installation", "older": "older", "foreign": "another installation"}
    assert words[wrong] in Installation.objects.get().mismatch
    with pytest.raises(CommandError, match="Nothing is reconciled"):
        call_command("installation", "show")


def test_an_operators_word_lets_it_go_on_slowly(wrong: str, host: FakeHost) -> None:
    a_pass()
    call_command("installation", "accept")
    assert not installation.is_mismatched()
    a_pass()
    assert not installation.is_mismatched()
    assert len(installation.list_quarantine()) == 2
    assert all(held.reason == "unknown" for held in installation.list_quarantine())


def test_a_state_of_another_time_loses_no_rows(image: Template, host: FakeHost) -> None:
    """The state directory is the one that was restored, or is another's."""
    host.book.adopt(Installation(epoch=1).claim())
    host.stored.clear()
    a_pass()
    image.refresh_from_db()
    assert image.status == "ready"
    assert installation.is_mismatched()


def test_a_state_from_before_there_were_ids_is_claimed_by_its_own_rows_alone(
    image: Template, host: FakeHost
) -> None:
    path = host.book._path
    path.unlink()
    tasks.tidy()
    assert not installation.is_mismatched()
    path.unlink()
    image.delete()
    tasks.tidy()
    assert "knows none" in Installation.objects.get().mismatch


def test_a_state_directory_that_is_not_there_loses_no_rows(image: Template, host: FakeHost) -> None:
    """Its disk is not mounted, say; the agent has made an empty one in its place."""
    path, kept = host.book._path, dict(host.stored)
    record = path.read_bytes()
    path.unlink()
    host.stored.clear()
    a_pass()
    image.refresh_from_db()
    assert image.status == "ready"
    assert "mounted" in Installation.objects.get().mismatch
    # It is mounted.
    path.write_bytes(record)
    host.stored.update(kept)
    a_pass()
    assert not installation.is_mismatched()


def test_the_hosts_word_is_asked_anew_in_every_call(image: Template, host: FakeHost) -> None:
    """The worker of an older database, that has not heard of it yet, does no harm."""
    row = Installation.objects.get()
    tasks.tidy()
    with pytest.raises(InstallationMismatch):
        host.reconcile(Reconcile(row.claim(), images=[]))
    assert set(host.stored) == {image.image_id}


def test_a_pass_waits_for_another_that_changes_the_mark(
    image: Template, host: FakeHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both begin on the same minute."""
    host.stored["img_unknown"] = image_like("img_unknown")
    installation.advance_mark(Installation.objects.get())
    waited = []

    def other_goes_on() -> None:
        waited.append(True)
        tasks.tidy()

    monkeypatch.setattr(installation, "pause", other_goes_on)
    reconcile_images()
    assert len(waited) == 1
    assert [held.key for held in installation.list_quarantine()] == ["image.img_unknown"]


def test_an_image_that_is_gone_makes_its_template_failed_and_back(
    image: Template, host: FakeHost, actor: Actor
) -> None:
    gone = host.stored.pop(image.image_id)
    tasks.tidy()
    image.refresh_from_db()
    assert (image.status, image.error_code) == ("failed", "image_lost")
    assert "Rebuild" in image.error_message
    with pytest.raises(Conflict):
        services.create_sandbox(actor, SandboxSpec(template=image.pk))
    # It is not surplus when it comes back: its row is there.
    host.stored[image.image_id] = gone
    reconcile_images()
    tasks.tidy()
    image.refresh_from_db()
    assert (image.status, image.error_code, image.error_message) == ("ready", "", "")
    assert services.create_sandbox(actor, SandboxSpec(template=image.pk)).status == "running"
    kinds = list(image.events.values_list("kind", flat=True))
    assert kinds[-2:] == ["image_lost", "image_restored"]


def test_who_meets_a_lost_image_first_says_so(
    image: Template, host: FakeHost, actor: Actor
) -> None:
    del host.stored[image.image_id]
    with pytest.raises(Conflict, match="gone"):
        services.create_sandbox(actor, SandboxSpec(template=image.pk))
    image.refresh_from_db()
    assert image.error_code == "image_lost"


def test_a_lost_snapshot_is_ready_again_when_it_is_back(host: FakeHost, actor: Actor) -> None:
    sandbox = services.create_sandbox(actor, SandboxSpec(template="debian-12"))
    snapshot = services.create_snapshot(actor, sandbox.pk, SnapshotSpec())
    taken = host.taken.pop(snapshot.pk)
    tasks.tidy()
    snapshot.refresh_from_db()
    assert snapshot.status == "failed"
    host.taken[snapshot.pk] = taken
    aged(host, snapshot.pk, OLD)
    tasks.tidy()
    snapshot.refresh_from_db()
    assert (snapshot.status, snapshot.error_message) == ("ready", "")
    assert set(host.taken) == {snapshot.pk}


def test_an_image_is_given_to_a_team_as_a_template(
    image: Template, host: FakeHost, actor: Actor
) -> None:
    host.stored["img_unknown"] = image_like("img_unknown")
    a_pass()
    call_command(
        "quarantine", "restore", "image.img_unknown", team=actor.team.slug, name="once more"
    )
    given = Template.objects.get(image_id="img_unknown")
    assert (given.team, given.name, given.status) == (actor.team, "once more", "ready")
    assert services.create_sandbox(actor, SandboxSpec(template=given.pk)).status == "running"
    a_pass()
    assert "img_unknown" in host.stored
    with pytest.raises(Conflict, match="already"):
        adopt_image(actor.team, "img_unknown", "twice")


@pytest.mark.django_db(transaction=True)
def test_no_connection_is_held_while_the_host_is_asked(
    plans: None, image: Template, host: FakeHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = []
    for name in ("agree", "reconcile", "images", "quarantine"):
        real = getattr(host, name)

        def asked(*args: object, real: object = real, **options: object) -> object:
            held.append(connection.connection is not None)
            assert callable(real)
            return real(*args, **options)

        monkeypatch.setattr(host, name, asked)
    a_pass()
    installation.list_quarantine()
    assert len(held) >= 4
    assert not any(held)

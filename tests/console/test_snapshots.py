"""The console's pages about snapshots: taking, listing, opening, starting from and deleting one."""

from __future__ import annotations

import pytest
from django.test import Client

from hostruntime.errors import HostFault, HostFull
from orkestr_console.accounts.models import Plan, Team
from sandboxes_app.models import Sandbox, Snapshot, SnapshotStatus
from tests.console.markup import tight
from tests.fakes.host import FakeHost

HTMX = {"HX-Request": "true"}
START = {"network": "off", "timeout_seconds": "600"}


@pytest.fixture
def snapshot(console: Client, sandbox: Sandbox) -> Snapshot:
    console.post(f"/sandboxes/{sandbox.pk}/snapshot/", {"name": "<b>before"})
    return Snapshot.objects.get()


def page_of(snapshot: Snapshot) -> str:
    return f"/sandboxes/snapshots/{snapshot.pk}/"


def test_one_is_taken_from_its_sandboxs_page_and_leads_to_its_own(
    console: Client, sandbox: Sandbox, host: FakeHost
) -> None:
    address = f"/sandboxes/{sandbox.pk}/snapshot/"
    assert f'href="{address}"' in tight(console.get(f"/sandboxes/{sandbox.pk}/"))
    assert "Take a snapshot" in tight(console.get(address))
    answer = console.post(address, {"name": "  before  "})
    snapshot = Snapshot.objects.get()
    assert (snapshot.name, snapshot.status) == ("before", "ready")
    assert answer["Location"] == page_of(snapshot)
    page = tight(console.get(page_of(snapshot)))
    assert "The snapshot was taken." in page
    assert 'data-status="ready"' in page
    # It is all that follows: nothing asks again.
    assert "hx-trigger" not in page
    assert list(host.taken) == [snapshot.pk]


def test_what_cannot_be_taken_is_said_and_the_name_is_kept(
    console: Client, sandbox: Sandbox, host: FakeHost
) -> None:
    address, name = f"/sandboxes/{sandbox.pk}/snapshot/", "x" * 101
    answer = console.post(address, {"name": name})
    assert (answer.status_code, answer.context["form"].name) == (400, name)
    assert 'id="name-error"' in tight(answer)
    host.capture_fails = HostFull("x")
    answer = console.post(address, {"name": "mine"})
    assert (answer.status_code, answer.context["form"].name) == (503, "mine")
    assert "No snapshot was taken" in tight(answer)
    host.capture_fails = None
    Plan.objects.filter(pk="team").update(max_named_snapshots=0)
    answer = console.post(address)
    assert answer.status_code == 409
    assert "is using 0 of the 0 snapshots" in tight(answer)
    console.post(f"/sandboxes/{sandbox.pk}/terminate/")
    answer = console.post(address)
    assert answer.status_code == 409
    assert "is terminated, not running" in tight(answer)
    assert address not in tight(console.get(f"/sandboxes/{sandbox.pk}/"))


def test_the_list_has_those_there_are_and_what_is_left(
    console: Client, snapshot: Snapshot, other_console: Client
) -> None:
    assert "/sandboxes/snapshots/" in tight(console.get("/sandboxes/"))
    page = tight(console.get("/sandboxes/snapshots/"))
    assert f'<a href="{page_of(snapshot)}"><b>&lt;b&gt;before</b></a>' in page
    assert f'data-copy="{snapshot.pk}"' in page
    assert "124 MB" in page
    assert "1 of the" in page
    assert "hx-trigger" not in page
    assert "None yet" in tight(other_console.get("/sandboxes/snapshots/"))


def test_one_that_is_being_taken_is_followed(console: Client, snapshot: Snapshot) -> None:
    Snapshot.objects.update(status=SnapshotStatus.CAPTURING, size_mb=None, ready_at=None)
    for address in ("/sandboxes/snapshots/", page_of(snapshot)):
        page = tight(console.get(address))
        assert f'hx-get="{address}" hx-trigger="load delay:2s" hx-swap="outerHTML"' in page
        assert 'data-status="capturing"' in page
        assert "Start sandbox" not in page
        part = tight(console.get(address, headers=HTMX))
        assert "<html" not in part
        assert "hx-trigger" in part
    Snapshot.objects.update(status=SnapshotStatus.READY)
    for address in ("/sandboxes/snapshots/", page_of(snapshot)):
        assert "hx-trigger" not in tight(console.get(address, headers=HTMX))


def test_one_that_failed_says_why_and_starts_nothing(
    console: Client, sandbox: Sandbox, host: FakeHost
) -> None:
    host.capture_fails = HostFault("x")
    assert console.post(f"/sandboxes/{sandbox.pk}/snapshot/").status_code == 500
    failed = Snapshot.objects.get()
    page = tight(console.get(page_of(failed)))
    assert "The snapshot failed" in page
    assert failed.error_message[:20] in page
    assert "Start sandbox" not in page


def test_a_sandbox_is_started_from_one(console: Client, snapshot: Snapshot, host: FakeHost) -> None:
    page = tight(console.get(page_of(snapshot)))
    assert '<input type="radio" name="network" value="off" checked>' in page
    wanted = {**START, "network": "restricted", "env": "A=1", "allow_domains": "example.org"}
    answer = console.post(f"{page_of(snapshot)}start/", wanted)
    forked = Sandbox.objects.exclude(pk=snapshot.source_sandbox_id).get()
    assert answer["Location"] == f"/sandboxes/{forked.pk}/"
    assert (forked.network, forked.env, forked.size) == ("restricted", {"A": "1"}, snapshot.size)
    assert "example.org" in (forked.allow_domains or [])


def test_its_own_network_has_its_own_list_of_hosts(
    console: Client, snapshot: Snapshot, host: FakeHost
) -> None:
    Snapshot.objects.update(network="restricted", allow_domains=["narrow.example.org"])
    console.post(f"{page_of(snapshot)}start/", {**START, "network": "restricted"})
    forked = Sandbox.objects.exclude(pk=snapshot.source_sandbox_id).get()
    assert forked.allow_domains == ["narrow.example.org"]


def test_a_start_that_is_refused_keeps_what_was_chosen(
    console: Client, snapshot: Snapshot, host: FakeHost, team: Team
) -> None:
    answer = console.post(f"{page_of(snapshot)}start/", {**START, "env": "nonsense"})
    assert answer.status_code == 400
    assert answer.context["form"].env == "nonsense"
    assert 'id="env-error"' in tight(answer)
    assert "no-store" in answer["Cache-Control"]
    Plan.objects.filter(pk="team").update(max_concurrent_sandboxes=1)
    answer = console.post(f"{page_of(snapshot)}start/", START)
    assert answer.status_code == 403
    assert "is using 1 of the 1 concurrent sandboxes" in tight(answer)
    # The host has lost it, which its page says at once.
    Plan.objects.filter(pk="team").update(max_concurrent_sandboxes=9)
    host.taken.clear()
    answer = console.post(f"{page_of(snapshot)}start/", START)
    assert answer.status_code == 409
    assert "The host lost the files of this snapshot" in tight(answer)
    assert Sandbox.objects.count() == 1


def test_deleting_asks_first(console: Client, snapshot: Snapshot, host: FakeHost) -> None:
    page = tight(console.get(f"{page_of(snapshot)}delete/"))
    assert "124 MB on disk" in page
    assert list(host.taken) == [snapshot.pk]
    answer = console.post(f"{page_of(snapshot)}delete/", follow=True)
    assert "The snapshot &lt;b&gt;before was deleted." in tight(answer)
    assert host.taken == {}
    assert console.get(page_of(snapshot)).status_code == 404

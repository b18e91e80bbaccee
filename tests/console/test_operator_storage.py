"""The operator's page about storage: what was set aside, put back and deleted, and by whom."""

from __future__ import annotations

import time
from typing import Any

import pytest
from django.test import Client

from hostruntime.wire.images import ImageInfo
from hostruntime.wire.reconciliation import QuarantinedItemInfo
from orkestr_console.accounts.models import AuditEntry, Team, User
from orkestr_console.installation import services as installation
from orkestr_console.installation.models import Installation
from tests.console.markup import tight
from tests.fakes.host import FakeHost

PAGE = "/operator/storage/"
KEY = "image.img_lost"


def text(answer: Any) -> str:
    return tight(answer)


@pytest.fixture
def operator(team: Team) -> Client:
    client = Client()
    client.force_login(User.objects.create_superuser("root@example.org", "x", name="Root"))
    return client


@pytest.fixture
def held(host: FakeHost) -> QuarantinedItemInfo:
    detail = "<b>no template</b> names it"
    info = QuarantinedItemInfo(KEY, "image", "img_lost", "unknown", detail, time.time(), 5_000_000)
    host.held[KEY] = (info, ImageInfo("img_lost", "template"))
    return info


@pytest.mark.parametrize("path", ["", f"{KEY}/restore/", f"{KEY}/delete/", "accept/"])
def test_to_anybody_else_it_is_not_there(
    console: Client, host: FakeHost, held: QuarantinedItemInfo, path: str
) -> None:
    assert console.get(PAGE + path).status_code in {404, 405}
    assert console.post(PAGE + path).status_code in {404, 405}
    assert set(host.held) == {KEY}


def test_it_lists_what_was_set_aside_as_text(operator: Client, held: QuarantinedItemInfo) -> None:
    page = text(operator.get(PAGE))
    assert "img_lost" in page
    assert "&lt;b&gt;no template&lt;/b&gt; names it" in page
    assert "Keep them together" not in page


def test_something_is_put_back(operator: Client, host: FakeHost, held: QuarantinedItemInfo) -> None:
    answer = operator.post(f"{PAGE}{KEY}/restore/", follow=True)
    assert "was put back" in text(answer)
    assert "Quarantine is empty" in text(answer)
    assert set(host.stored) == {"img_lost"}
    assert "There is nothing called" in text(operator.post(f"{PAGE}{KEY}/restore/", follow=True))


def test_something_is_deleted_once_that_was_confirmed(
    operator: Client, host: FakeHost, held: QuarantinedItemInfo
) -> None:
    assert "Delete it permanently?" in text(operator.get(f"{PAGE}{KEY}/delete/"))
    assert set(host.held) == {KEY}
    assert "was deleted" in text(operator.post(f"{PAGE}{KEY}/delete/", follow=True))
    assert host.held == {}
    assert host.stored == {}


def test_a_mismatch_is_said_and_an_operators_word_ends_it(
    operator: Client, host: FakeHost, team: Team
) -> None:
    installation.agree(lambda: True)
    Installation.objects.all().delete()
    assert not installation.agree(lambda: True)
    why = "belongs to another installation"
    assert why in text(operator.get(PAGE))
    assert why in text(operator.get("/operator/"))
    assert why in text(operator.get(f"{PAGE}accept/"))
    assert installation.is_mismatched()
    assert "belong together from now on" in text(operator.post(f"{PAGE}accept/", follow=True))
    assert not installation.is_mismatched()
    assert installation.agree(lambda: False)
    assert why not in text(operator.get(PAGE))


def test_it_says_when_the_host_does_not_answer(operator: Client, host: FakeHost) -> None:
    host.down = True
    answer = operator.get(PAGE)
    assert answer.status_code == 200
    assert "Quarantine is empty" not in text(answer)
    assert 'role="alert"' in text(answer)


def test_what_an_operator_does_is_on_record(
    console: Client, alice: User, host: FakeHost, held: QuarantinedItemInfo
) -> None:
    alice.is_staff = True
    alice.save()
    console.post(f"{PAGE}{KEY}/restore/")
    console.post(f"{PAGE}{KEY}/delete/")
    found = AuditEntry.objects.order_by("pk").values_list("action", "outcome", "object_id")
    assert list(found) == [
        ("quarantine.restore", "done", "img_lost"),
        ("quarantine.delete", "denied", KEY),
    ]

"""The pages of people: inviting, joining by link, roles, leaving, switching team."""

from __future__ import annotations

import re
from typing import Any

import pytest
from django.test import Client

from orkestr_console.accounts.models import AuditEntry, Membership, Role, Team, User
from tests.conftest import make_user
from tests.console.markup import tight

NEW = {"name": "Eve", "email": "eve@example.org", "password": "another long passphrase"}


def text(answer: Any) -> str:
    return tight(answer)


def link_in(answer: Any) -> str:
    found = re.search(r'id="invitation-link">http://testserver(/join/[^<]+)<', text(answer))
    assert found, text(answer)
    return found[1]


@pytest.fixture
def visitor() -> Client:
    """A visitor nobody is signed in with."""
    return Client()


def test_a_link_is_made_shown_once_and_lets_somebody_new_in(
    console: Client, visitor: Client, team: Team
) -> None:
    made = console.post("/team/people/", {"role": "admin", "email": ""})
    link = link_in(made)
    assert "no-store" in made["Cache-Control"]
    listed = text(console.get("/team/people/"))
    assert link not in listed and "whoever has the link" in listed
    page = text(visitor.get(link))
    assert "Join Acme" in page and "Alice invited you to join as admin" in page
    answer = visitor.post(link, NEW)
    assert (answer.status_code, answer["Location"]) == (302, "/templates/")
    page = text(visitor.get("/templates/"))
    assert "Welcome to Acme" in page
    assert Membership.objects.get(user__email=NEW["email"], team=team).role == Role.ADMIN


def test_somebody_with_an_account_signs_in_and_comes_back(
    console: Client, visitor: Client, charlie: User, team: Team
) -> None:
    link = link_in(console.post("/team/people/", {"role": "member", "email": charlie.email}))
    assert f"/sign-in/?next={link}" in text(visitor.get(link))
    visitor.force_login(charlie)
    assert "signed in as <b>charlie@example.org" in text(visitor.get(link))
    assert visitor.post(link)["Location"] == "/templates/"
    # The team that was joined is the one acted for, and the other is on the list.
    assert "Welcome to Acme" in text(visitor.get("/templates/"))
    assert "Globex" in text(visitor.get("/teams/"))


def test_what_is_wrong_with_a_new_account_is_said_and_only_the_password_lost(
    console: Client, visitor: Client
) -> None:
    link = link_in(console.post("/team/people/", {"role": "member"}))
    answer = visitor.post(link, {**NEW, "password": "short"})
    assert answer.status_code == 400
    page = text(answer)
    assert 'id="password-error"' in page and 'value="eve@example.org"' in page
    assert 'value="short"' not in page
    answer = visitor.post(link, {**NEW, "name": "", "email": "e\0"})
    assert answer.status_code == 400
    assert not User.objects.filter(name="Eve").exists()


def test_a_bad_link_is_a_page_that_says_so(visitor: Client, db: None) -> None:
    for secret in ("nothing", "%00", "a" * 500):
        answer = visitor.get(f"/join/{secret}/")
        assert answer.status_code in {400, 404}
        assert "Traceback" not in text(answer)
    assert "Check that the link is complete" in text(visitor.get("/join/nothing/"))


def test_a_bad_invitation_is_said_inline(console: Client, bob: User) -> None:
    answer = console.post("/team/people/", {"role": "member", "email": "BOB@example.org"})
    assert answer.status_code == 400
    assert "is already in the team" in text(answer) and 'id="email-error"' in text(answer)
    answer = console.post("/team/people/", {"role": "king", "email": "x@example.org"})
    assert answer.status_code == 400
    assert 'value="x@example.org"' in text(answer)


def test_an_invitation_is_revoked(console: Client, visitor: Client) -> None:
    link = link_in(console.post("/team/people/", {"role": "member"}))
    address = re.search(r"/team/invitations/[^/]+/revoke/", text(console.get("/team/people/")))
    assert address
    answer = console.post(address[0], follow=True)
    assert "Its link no longer works" in text(answer)
    assert "has been revoked" in text(visitor.get(link))


def test_a_role_and_a_share_are_changed(console: Client, bob: User) -> None:
    typed = {"role": "admin", "max_templates": "2", "max_concurrent_sandboxes": ""}
    answer = console.post(f"/team/people/{bob.pk}/", typed, follow=True)
    assert "Bob was changed" in text(answer) and "2 templates" in text(answer)
    assert Membership.objects.get(user=bob).role == Role.ADMIN


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ({"role": "king"}, "There is no role &#x27;king&#x27;"),
        ({"role": "admin", "max_templates": "-1"}, "Templates must be"),
        ({"role": "admin", "max_templates": "many"}, "Templates must be"),
    ],
)
def test_a_bad_change_changes_nothing(
    console: Client, bob: User, typed: dict[str, str], said: str
) -> None:
    answer = console.post(f"/team/people/{bob.pk}/", typed)
    assert answer.status_code == 400
    assert said in text(answer)
    assert Membership.objects.get(user=bob).role == Role.MEMBER


def test_the_last_owner_is_told_on_the_page(console: Client, alice: User, bob: User) -> None:
    for address, typed in (
        (f"/team/people/{alice.pk}/remove/", {}),
        (f"/team/people/{alice.pk}/", {"role": "member"}),
    ):
        answer = console.post(address, typed)
        assert answer.status_code == 409
        assert "Make somebody else an owner first" in text(answer)


def test_removing_asks_first_and_says_what_is_left(console: Client, bob: User) -> None:
    assert "Bob" in text(console.get(f"/team/people/{bob.pk}/remove/"))
    assert Membership.objects.filter(user=bob).exists()
    answer = console.post(f"/team/people/{bob.pk}/remove/", follow=True)
    assert "Bob was removed." in text(answer)
    assert not Membership.objects.filter(user=bob).exists()


def test_a_member_sees_people_and_no_buttons_but_their_own(
    alice: User, bob: User, visitor: Client
) -> None:
    visitor.force_login(bob)
    page = text(visitor.get("/team/people/"))
    assert "alice@example.org" in page
    assert "Invite people" not in page and "Change" not in page
    assert f"/team/people/{bob.pk}/remove/" in page
    assert f"/team/people/{alice.pk}/remove/" not in page


def test_leaving_the_only_team_ends_at_a_page_that_says_so(bob: User, visitor: Client) -> None:
    visitor.force_login(bob)
    answer = visitor.post(f"/team/people/{bob.pk}/remove/", follow=True)
    assert answer.status_code == 403
    assert "You are in no team yet" in text(answer)


def test_switching_team_switches_what_is_seen(
    alice: User, other_team: Team, console: Client
) -> None:
    Membership.objects.create(user=alice, team=other_team, role=Role.MEMBER)
    make_user("gina", other_team, Role.OWNER)
    assert "gina@example.org" not in text(console.get("/team/people/"))
    assert console.post("/team/switch/", {"team": other_team.pk}).status_code == 302
    page = text(console.get("/team/people/"))
    assert "gina@example.org" in page and "Invite people" not in page


def test_an_operator_finds_any_team(team: Team, other_team: Team, visitor: Client) -> None:
    visitor.force_login(User.objects.create_superuser("root@example.org", "x", name="Root"))
    page = text(visitor.get("/teams/?q=glo"))
    assert other_team.pk in page and f'value="{team.pk}"' not in page
    visitor.post("/team/switch/", {"team": other_team.pk})
    assert "Invite people" in text(visitor.get("/team/people/"))


def test_an_operators_new_team_comes_with_its_owners_link(
    team: Team, visitor: Client, charlie: User
) -> None:
    operator = Client()
    operator.force_login(User.objects.create_superuser("root@example.org", "x", name="Root"))
    typed = {"name": "Initech", "plan": "pro", "email": "Eve@example.org"}
    made = operator.post("/operator/teams/new/", typed)
    assert "Team Initech created" in text(made)
    link = link_in(made)
    visitor.post(link, NEW)
    place = Membership.objects.get(user__email="eve@example.org")
    assert (place.team.name, place.team.plan_id, place.role) == ("Initech", "pro", Role.OWNER)


def test_a_team_with_a_bad_owner_is_not_made(team: Team) -> None:
    operator = Client()
    operator.force_login(User.objects.create_superuser("root@example.org", "x", name="Root"))
    typed = {"name": "Initech", "plan": "pro", "email": "nobody"}
    answer = operator.post("/operator/teams/new/", typed)
    assert answer.status_code == 400
    assert 'id="email-error"' in text(answer) and 'value="Initech"' in text(answer)
    assert not Team.objects.filter(name="Initech").exists()


def test_a_link_that_is_no_longer_good_is_on_record_when_it_is_posted(
    console: Client, visitor: Client, team: Team
) -> None:
    link = link_in(console.post("/team/people/", {"role": "member", "email": ""}))
    assert visitor.post(link, {**NEW, "password": "short"}).status_code == 400
    visitor.post(link, NEW)
    stranger = Client()
    assert stranger.get(link).status_code == 404
    assert stranger.post(link, {**NEW, "email": "fay@example.org"}).status_code == 404
    entries = AuditEntry.objects.filter(action="member.join", team_id=team.pk).order_by("pk")
    assert [(e.who, e.outcome) for e in entries] == [
        ("eve@example.org", "denied"),
        ("eve@example.org", "done"),
        ("fay@example.org", "denied"),
    ]

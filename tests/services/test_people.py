"""Who is in a team, and what never may happen to it: to have no owner."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from threading import Barrier

import pytest
from django.db import connections
from django.utils import timezone

from orkestr_console.accounts import people
from orkestr_console.accounts.actor import Actor
from orkestr_console.accounts.models import AuditEntry, Invitation, Membership, Role, Team, User
from orkestr_console.accounts.people import InviteSpec, NewPersonSpec, ShareSpec
from orkestr_console.accounts.services import mint_token, user_actor
from orkestr_console.core.errors import Conflict, DomainError, Forbidden, InvalidInput, NotFound
from tests.conftest import PASSWORD, make_user

OTHER = "another long passphrase"


def acting(user: User) -> Actor:
    return user_actor(user, None, "192.0.2.1")


def roles(team: Team) -> dict[str, str]:
    return dict(Membership.objects.filter(team=team).values_list("user__name", "role"))


def actions(team: Team) -> list[tuple[str, str]]:
    rows = AuditEntry.objects.filter(team_id=team.pk).order_by("pk")
    return [(row.action, row.outcome) for row in rows]


@pytest.fixture
def dora(team: Team) -> User:
    """An admin of Acme."""
    return make_user("dora", team, Role.ADMIN)


# Roles ----------------------------------------------------------------------------------------


def test_people_are_listed_owners_first(alice: User, bob: User, dora: User) -> None:
    listed = [place.user.name for place in people.list_people(acting(bob))]
    assert listed == ["Alice", "Dora", "Bob"]


@pytest.mark.parametrize(
    ("by", "of", "role", "expected"),
    [
        ("dora", "bob", Role.ADMIN, None),
        ("alice", "bob", Role.OWNER, None),
        ("alice", "dora", Role.MEMBER, None),
        ("bob", "bob", Role.ADMIN, Forbidden),
        ("dora", "dora", Role.OWNER, Forbidden),
        ("dora", "alice", Role.MEMBER, Forbidden),
        ("alice", "alice", Role.ADMIN, Conflict),
    ],
)
def test_who_may_give_which_role(
    team: Team,
    alice: User,
    bob: User,
    dora: User,
    by: str,
    of: str,
    role: Role,
    expected: type[DomainError] | None,
) -> None:
    cast = {"alice": alice, "bob": bob, "dora": dora}
    before = roles(team)
    if expected is None:
        people.change_role(acting(cast[by]), cast[of].pk, role)
        assert roles(team) == {**before, of.title(): role}
        assert actions(team) == [("member.role", "done")]
    else:
        with pytest.raises(expected):
            people.change_role(acting(cast[by]), cast[of].pk, role)
        assert roles(team) == before
        assert [outcome for _, outcome in actions(team)] == ["denied"]


def test_the_same_role_again_is_no_change(team: Team, alice: User, bob: User) -> None:
    people.change_role(acting(alice), bob.pk, Role.MEMBER)
    people.set_share(acting(alice), bob.pk, ShareSpec())
    assert actions(team) == []


def test_a_role_counts_with_the_next_call(alice: User, bob: User) -> None:
    people.change_role(acting(alice), bob.pk, Role.ADMIN)
    assert acting(bob).role == Role.ADMIN


def test_a_share_is_kept_and_on_record(team: Team, alice: User, bob: User) -> None:
    people.set_share(acting(alice), bob.pk, ShareSpec(max_templates=0, max_concurrent_sandboxes=3))
    place = Membership.objects.get(user=bob, team=team)
    assert (place.max_templates, place.max_concurrent_sandboxes) == (0, 3)
    assert AuditEntry.objects.get(action="member.share").data == {
        "changed": {"shares": [[None, None], [0, 3]]}
    }


# Leaving --------------------------------------------------------------------------------------


def test_the_last_owner_cannot_leave_and_is_told_what_to_do(team: Team, alice: User) -> None:
    with pytest.raises(Conflict, match="Make somebody else an owner first"):
        people.leave(acting(alice))
    with pytest.raises(Conflict):
        people.remove(acting(alice), alice.pk)
    assert roles(team) == {"Alice": "owner"}


def test_an_owner_leaves_when_there_is_another(team: Team, alice: User, bob: User) -> None:
    people.change_role(acting(alice), bob.pk, Role.OWNER)
    people.leave(acting(alice))
    assert roles(team) == {"Bob": "owner"}
    with pytest.raises(Forbidden, match="in no team"):
        acting(alice)


def test_whoever_goes_leaves_their_tokens_and_that_is_said(
    team: Team, alice: User, bob: User
) -> None:
    mint_token(team, "CI", ["sandboxes:read"], created_by=bob)
    gone = people.remove(acting(alice), bob.pk)
    assert (gone.name, gone.tokens, gone.invitations) == ("Bob", 1, 0)
    assert roles(team) == {"Alice": "owner"}


def test_an_admin_removes_members_and_no_owner(
    team: Team, alice: User, bob: User, dora: User
) -> None:
    people.remove(acting(dora), bob.pk)
    with pytest.raises(Forbidden):
        people.remove(acting(dora), alice.pk)
    assert roles(team) == {"Alice": "owner", "Dora": "admin"}


def test_people_of_another_team_are_unknown(alice: User, charlie: User) -> None:
    for call in (
        lambda: people.remove(acting(alice), charlie.pk),
        lambda: people.change_role(acting(alice), charlie.pk, Role.MEMBER),
        lambda: people.set_share(acting(alice), charlie.pk, ShareSpec()),
    ):
        with pytest.raises(NotFound):
            call()
    assert Membership.objects.filter(user=charlie).exists()


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("how", ["leave", "remove each other", "step down"])
def test_two_owners_who_go_at_once_leave_one(
    plans: None, team: Team, alice: User, bob: User, how: str
) -> None:
    Membership.objects.filter(user=bob).update(role=Role.OWNER)
    gate = Barrier(2)

    def go(user: User, other: User) -> str:
        actor = acting(user)
        gate.wait()
        try:
            if how == "leave":
                people.leave(actor)
            elif how == "step down":
                people.change_role(actor, user.pk, Role.MEMBER)
            else:
                people.remove(actor, other.pk)
        except DomainError:
            return "refused"
        finally:
            connections.close_all()
        return "done"

    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(go, alice, bob), pool.submit(go, bob, alice)]
        assert sorted(one.result() for one in both) == ["done", "refused"]
    assert list(roles(team).values()).count("owner") == 1


# Inviting -------------------------------------------------------------------------------------


def test_an_invitation_is_stored_hashed_and_taken_once(
    team: Team, alice: User, charlie: User, bob: User
) -> None:
    row, secret = people.invite(acting(alice), InviteSpec(role=Role.ADMIN))
    assert secret not in str(Invitation.objects.filter(pk=row.pk).values()[0])
    place = people.accept_invitation(charlie, secret, "192.0.2.3")
    assert (place.team, place.role) == (team, Role.ADMIN)
    assert people.list_invitations(acting(alice)) == []
    with pytest.raises(NotFound, match=r"has been used already\. Ask whoever sent it"):
        people.accept_invitation(
            make_user("eve", Team.objects.get(slug="globex"), Role.MEMBER), secret, None
        )
    assert actions(team) == [
        ("invitation.create", "done"),
        ("member.join", "done"),
        ("member.join", "denied"),
    ]


@pytest.mark.django_db(transaction=True)
def test_one_link_opened_by_two_at_once_lets_one_in(plans: None, team: Team, alice: User) -> None:
    _, secret = people.invite(acting(alice), InviteSpec())
    gate = Barrier(2)

    def register(name: str) -> str:
        spec = NewPersonSpec(name=name, email=f"{name}@example.org")
        gate.wait()
        try:
            people.register(spec, OTHER, secret, None)
        except NotFound:
            return "refused"
        finally:
            connections.close_all()
        return "in"

    with ThreadPoolExecutor(2) as pool:
        assert sorted(pool.map(register, ["eve", "fay"])) == ["in", "refused"]
    assert (User.objects.count(), len(roles(team))) == (2, 2)


def test_a_link_that_is_no_longer_good_says_why(alice: User, charlie: User) -> None:
    row, secret = people.invite(acting(alice), InviteSpec())
    Invitation.objects.filter(pk=row.pk).update(expires_at=timezone.now() - timedelta(seconds=1))
    with pytest.raises(NotFound, match="has expired"):
        people.accept_invitation(charlie, secret, None)
    row, secret = people.invite(acting(alice), InviteSpec())
    people.revoke_invitation(acting(alice), row.pk)
    people.revoke_invitation(acting(alice), row.pk)
    with pytest.raises(NotFound, match="has been revoked"):
        people.accept_invitation(charlie, secret, None)
    with pytest.raises(NotFound, match="Check that the link is complete"):
        people.accept_invitation(charlie, "nothing", None)


def test_whoever_was_removed_cannot_come_back_by_a_link_they_made(
    team: Team, alice: User, dora: User
) -> None:
    kept = people.invite(acting(alice), InviteSpec())[1]
    row, own = people.invite(acting(dora), InviteSpec(role=Role.ADMIN))
    gone = people.remove(acting(alice), dora.pk)
    assert (gone.invitations, people.find_invitation(kept).created_by) == (1, alice)
    with pytest.raises(NotFound, match="has been revoked"):
        people.accept_invitation(dora, own, None)
    with pytest.raises(NotFound, match="has been revoked"):
        people.register(NewPersonSpec(name="Eve", email="eve@example.org"), OTHER, own, None)
    assert roles(team) == {"Alice": "owner"}
    entry = AuditEntry.objects.get(action="invitation.revoke")
    assert (entry.object_id, entry.who) == (row.pk, "alice@example.org")


def test_whoever_leaves_takes_their_links_along(alice: User, dora: User) -> None:
    secret = people.invite(acting(dora), InviteSpec())[1]
    people.leave(acting(dora))
    with pytest.raises(NotFound, match="has been revoked"):
        people.accept_invitation(dora, secret, None)


def test_a_demoted_persons_links_give_no_more_than_they_have(
    team: Team, alice: User, charlie: User, dora: User
) -> None:
    high = people.invite(acting(dora), InviteSpec(role=Role.ADMIN))[1]
    low = people.invite(acting(dora), InviteSpec(role=Role.MEMBER))[1]
    people.change_role(acting(alice), dora.pk, Role.MEMBER)
    people.change_role(acting(alice), dora.pk, Role.ADMIN)
    with pytest.raises(NotFound, match="has been revoked"):
        people.accept_invitation(charlie, high, None)
    assert people.accept_invitation(charlie, low, None).role == Role.MEMBER
    assert roles(team)["Dora"] == "admin"


def test_a_link_whose_maker_is_gone_is_useless_though_it_was_never_revoked(
    team: Team, alice: User, dora: User
) -> None:
    """As those are that were left behind before departures revoked them, or made meanwhile."""
    secret = people.invite(acting(dora), InviteSpec(role=Role.ADMIN))[1]
    place = Membership.objects.filter(user=dora, team=team)
    place.update(role=Role.MEMBER)
    with pytest.raises(NotFound, match="has been revoked"):
        people.find_invitation(secret)
    place.delete()
    with pytest.raises(NotFound, match="has been revoked"):
        people.accept_invitation(dora, secret, None)
    User.objects.filter(pk=dora.pk).update(is_staff=True)
    assert people.find_invitation(secret).is_open()


@pytest.mark.django_db(transaction=True)
def test_merging_while_the_maker_is_removed_is_before_or_after(
    plans: None, team: Team, alice: User, dora: User
) -> None:
    """Both lock the team first: neither waits for the other in a circle."""
    for name in ("eve", "fay", "gus", "hal"):
        Membership.objects.get_or_create(user=dora, team=team, defaults={"role": Role.ADMIN})
        secret = people.invite(acting(dora), InviteSpec())[1]
        gate = Barrier(2)

        def register(name: str = name, secret: str = secret, gate: Barrier = gate) -> str:
            gate.wait()
            try:
                spec = NewPersonSpec(name=name, email=f"{name}@example.org")
                people.register(spec, OTHER, secret, None)
            except NotFound:
                return "refused"
            finally:
                connections.close_all()
            return "in"

        def remove(gate: Barrier = gate) -> int:
            gate.wait()
            try:
                return people.remove(acting(alice), dora.pk).invitations
            finally:
                connections.close_all()

        with ThreadPoolExecutor(2) as pool:
            joining, removing = pool.submit(register), pool.submit(remove)
            assert (joining.result(), removing.result()) in {("in", 0), ("refused", 1)}


def test_an_invitation_for_an_address_is_for_nobody_else(
    team: Team, alice: User, charlie: User
) -> None:
    row, secret = people.invite(acting(alice), InviteSpec(email=" Eve@Example.org "))
    assert row.email == "eve@example.org"
    with pytest.raises(Forbidden, match=r"is for eve@example.org, and you"):
        people.accept_invitation(charlie, secret, None)
    with pytest.raises(InvalidInput, match=r"must be eve@example.org"):
        people.register(NewPersonSpec(name="F", email="fay@example.org"), OTHER, secret, None)
    eve = people.register(NewPersonSpec(name="Eve", email="EVE@example.org"), OTHER, secret, None)
    assert roles(team)["Eve"] == "member"
    assert eve.email == "eve@example.org"


@pytest.mark.parametrize(
    ("email", "password", "field"),
    [
        ("alice@example.org", OTHER, "email"),
        ("no address", OTHER, "email"),
        ("eve@example.org", "short", "password"),
        ("eve@example.org", "password123", "password"),
        ("eve@example.org", "", "password"),
    ],
)
def test_a_new_account_is_refused_by_field_and_the_link_stays_good(
    alice: User, email: str, password: str, field: str
) -> None:
    _, secret = people.invite(acting(alice), InviteSpec())
    with pytest.raises(InvalidInput) as refused:
        people.register(NewPersonSpec(name="Eve", email=email), password, secret, None)
    assert list(refused.value.fields or ()) == [field]
    assert people.find_invitation(secret).is_open()
    assert User.objects.count() == 1


def test_whoever_is_refused_an_invitation_is_on_record_with_its_team(
    team: Team, alice: User, charlie: User
) -> None:
    row, secret = people.invite(acting(alice), InviteSpec(email="eve@example.org"))
    with pytest.raises(Forbidden):
        people.accept_invitation(charlie, secret, "192.0.2.3")
    with pytest.raises(InvalidInput):
        people.register(NewPersonSpec(name="F", email="fay@example.org"), OTHER, secret, None)
    with pytest.raises(InvalidInput):
        people.register(NewPersonSpec(name="E", email="eve@example.org"), "hunter2", secret, None)
    with pytest.raises(NotFound):
        people.accept_invitation(charlie, "no such link", None)
    entries = AuditEntry.objects.filter(outcome="denied", team_id=team.pk).order_by("pk")
    assert [(e.who, e.user_id, e.action, e.object_id) for e in entries] == [
        ("charlie@example.org", charlie.pk, "member.join", row.pk),
        ("fay@example.org", None, "member.join", row.pk),
        ("eve@example.org", None, "member.join", row.pk),
    ]
    assert entries[0].address == "192.0.2.3"
    written = str(list(entries.values()))
    assert "hunter2" not in written and secret not in written
    assert AuditEntry.objects.filter(outcome="denied").count() == 3


def test_who_may_invite_whom(team: Team, alice: User, bob: User, dora: User) -> None:
    with pytest.raises(Forbidden):
        people.invite(acting(bob), InviteSpec())
    with pytest.raises(Forbidden):
        people.invite(acting(dora), InviteSpec(role=Role.OWNER))
    with pytest.raises(InvalidInput, match="is already in the team"):
        people.invite(acting(dora), InviteSpec(email="bob@example.org"))
    people.invite(acting(alice), InviteSpec(role=Role.OWNER))
    assert [outcome for _, outcome in actions(team)] == ["denied", "denied", "denied", "done"]


def test_whoever_is_in_already_keeps_the_role_and_the_link_stays_good(
    team: Team, alice: User, bob: User
) -> None:
    _, secret = people.invite(acting(alice), InviteSpec(role=Role.ADMIN))
    with pytest.raises(Conflict, match="already, as member"):
        people.accept_invitation(bob, secret, None)
    assert people.find_invitation(secret).is_open()
    assert roles(team)["Bob"] == "member"


def test_a_person_has_their_teams_and_an_operator_all(
    alice: User, charlie: User, other_team: Team
) -> None:
    Membership.objects.create(user=alice, team=other_team, role=Role.MEMBER)
    assert [team.name for team in people.list_teams(alice)] == ["Acme", "Globex"]
    assert [team.name for team in people.list_teams(charlie)] == ["Globex"]
    root = User.objects.create_superuser("root@example.org", PASSWORD, name="Root")
    assert [team.name for team in people.list_teams(root)] == ["Acme", "Globex"]
    assert [team.name for team in people.list_teams(root, "glo")] == ["Globex"]

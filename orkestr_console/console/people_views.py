"""The team's people and invitations, joining, and switching teams."""

from __future__ import annotations

from typing import Any

from django.contrib import messages
from django.http import HttpRequest, HttpResponse
from django.shortcuts import redirect, render
from django.urls import reverse
from django.views.decorators.cache import never_cache
from django.views.decorators.debug import sensitive_post_parameters
from django.views.decorators.http import require_http_methods, require_POST, require_safe

from orkestr_console.accounts import people, sessions
from orkestr_console.accounts.audit import MAX_NAME_LENGTH
from orkestr_console.accounts.models import Invitation, Membership, Role, User
from orkestr_console.accounts.services import TEAM_SESSION_KEY
from orkestr_console.console.people_forms import InviteForm, JoinForm, ShareForm
from orkestr_console.core.addresses import console_address
from orkestr_console.core.errors import DomainError, InvalidInput, NotFound
from orkestr_console.core.text import replace_unstorable
from orkestr_console.http.decorators import ConsoleRequest, console_page


@never_cache
@require_http_methods(["GET", "HEAD", "POST"])
@console_page
def people_page(request: ConsoleRequest) -> HttpResponse:
    """The people and open invitations; posting creates a link, which is shown once."""
    if request.method != "POST":
        return show(request, InviteForm())
    form = InviteForm.from_post(request.POST)
    try:
        invitation, secret = people.invite(request.actor, form.spec())
    except DomainError as error:
        form.add_error(error)
        return show(request, form, error.status)
    link = console_address(request) + reverse("console:join", args=[secret])
    return show(request, InviteForm(), link=link, made=invitation)


def show(request: ConsoleRequest, form: InviteForm, status: int = 200, **made: Any) -> HttpResponse:
    """The page."""
    actor = request.actor
    admin = actor.is_at_least(Role.ADMIN)
    context = {
        "form": form,
        "people": people.list_people(actor),
        "invitations": people.list_invitations(actor) if admin else [],
        "may_edit": admin,
        "roles": [role for role in Role if actor.is_at_least(role)],
        "is_owner": actor.is_at_least(Role.OWNER),
        "days": people.INVITATION_DAYS,
        **made,
    }
    return render(request, "console/people.html", context, status=status)


@require_POST
@console_page
def invitation_revoke(request: ConsoleRequest, invitation_id: str) -> HttpResponse:
    """Revoke an invitation."""
    people.revoke_invitation(request.actor, invitation_id)
    messages.success(request, "The invitation was revoked. Its link no longer works.")
    return redirect("console:people")


@require_http_methods(["GET", "HEAD", "POST"])
@console_page
def person_page(request: ConsoleRequest, user_id: int) -> HttpResponse:
    """One person: role and share, for admins."""
    request.actor.require_role(Role.ADMIN)
    membership = get_membership(request, user_id)
    form, status = ShareForm.current(membership), 200
    if request.method == "POST":
        form = ShareForm.from_post(request.POST)
        try:
            role = parse_role(request.POST.get("role", membership.role))
            spec = form.spec()
            people.change_role(request.actor, user_id, role)
            people.set_share(request.actor, user_id, spec)
        except DomainError as error:
            form.add_error(error)
            status = error.status
        else:
            messages.success(request, f"{membership.user.get_full_name()} was changed.")
            return redirect("console:people")
    context = {
        "place": membership,
        "form": form,
        "role": request.POST.get("role", membership.role),
        "roles": list(Role),
        "is_owner": request.actor.is_at_least(Role.OWNER),
    }
    return render(request, "console/person.html", context, status=status)


def get_membership(request: ConsoleRequest, user_id: int) -> Membership:
    """A person of the team. Raises ``NotFound``."""
    found = [row for row in people.list_people(request.actor) if row.user_id == user_id]
    if not found:
        raise NotFound(people.PERSON_NOT_FOUND)
    return found[0]


def parse_role(text: str) -> Role:
    """Raises ``InvalidInput``."""
    if text not in Role.values:
        raise InvalidInput(f"There is no role {text!r}; there are {', '.join(Role.values)}.")
    return Role(text)


@require_http_methods(["GET", "HEAD", "POST"])
@console_page
def person_remove(request: ConsoleRequest, user_id: int) -> HttpResponse:
    """Ask for confirmation, then remove somebody from the team, or leave it oneself."""
    own = request.user.pk == user_id
    if not own:
        request.actor.require_role(Role.ADMIN)
    membership = get_membership(request, user_id)
    context: dict[str, Any] = {"place": membership, "own": own}
    if request.method != "POST":
        return render(request, "console/person_remove.html", context)
    try:
        departure = people.leave(request.actor) if own else people.remove(request.actor, user_id)
    except DomainError as error:
        context["error"] = error.detail
        return render(request, "console/person_remove.html", context, status=error.status)
    left = f" {departure.tokens} API tokens they made still work." if departure.tokens else ""
    left += (
        f" {departure.invitations} open invitations were revoked." if departure.invitations else ""
    )
    words = f"You left {request.actor.team.name}." if own else f"{departure.name} was removed."
    messages.success(request, f"{words}{left}")
    return redirect("console:home" if own else "console:people")


@require_POST
@console_page
def switch_team(request: ConsoleRequest) -> HttpResponse:
    """Act for another of one's teams."""
    team_id = request.POST.get("team", "")
    if team_id not in {team.pk for team in people.list_teams(request.user)}:
        raise NotFound("You aren't in that team.")
    request.session[TEAM_SESSION_KEY] = team_id
    return redirect("templates:list")


@require_safe
@console_page
def teams_page(request: ConsoleRequest) -> HttpResponse:
    """All teams to switch to, with a search: an operator has more than fit a menu."""
    text = request.GET.get("q", "").strip()
    context = {"found": people.list_teams(request.user, text), "q": text}
    return render(request, "console/teams.html", context)


@sensitive_post_parameters("password")
@never_cache
@require_http_methods(["GET", "HEAD", "POST"])
def join(request: HttpRequest, secret: str) -> HttpResponse:
    """Accept an invitation: as the signed-in person, else with a new account."""
    user = request.user if isinstance(request.user, User) else None
    address = sessions.client_address(request)
    if request.method != "POST":
        invitation = people.find_invitation(secret)
        return join_page(request, invitation, JoinForm(email=invitation.email))
    form = JoinForm.from_post(request.POST)
    invitee = user or User(email=replace_unstorable(form.email)[:MAX_NAME_LENGTH])
    with people.record_refusals(secret, invitee, address):
        invitation = people.find_invitation(secret)
    try:
        if user is None:
            user = people.register(form.spec(), form.password, secret, address)
            sessions.sign_in(request, user)
        else:
            people.accept_invitation(user, secret, address)
    except DomainError as error:
        form.add_error(error)
        return join_page(request, invitation, form, error.status)
    request.session[TEAM_SESSION_KEY] = invitation.team_id
    messages.success(request, f"Welcome to {invitation.team.name}.")
    return redirect("templates:list")


def join_page(
    request: HttpRequest, invitation: Invitation, form: JoinForm, status: int = 200
) -> HttpResponse:
    """The page."""
    context = {"invitation": invitation, "form": form, "here": request.path}
    return render(request, "console/join.html", context, status=status)

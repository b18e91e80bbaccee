"""What an operator of this server sees of all teams, and what only they change."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from django.contrib import messages
from django.db import transaction
from django.http import HttpResponse
from django.shortcuts import redirect, render
from django.urls import reverse
from django.views.decorators.cache import never_cache
from django.views.decorators.http import require_http_methods, require_safe

from orkestr_console.accounts import audit, limit_changes, people
from orkestr_console.accounts.limit_changes import SIZES, Operator
from orkestr_console.accounts.limits import KINDS, build
from orkestr_console.accounts.models import Role
from orkestr_console.accounts.people import InviteSpec
from orkestr_console.console.limits_forms import AgreementForm, PlanForm, TeamForm
from orkestr_console.console.limits_views import counts
from orkestr_console.core.addresses import console_address
from orkestr_console.core.errors import DomainError
from orkestr_console.http.decorators import ConsoleRequest, console_page
from orkestr_console.installation import services as installation


def operator_of(request: ConsoleRequest) -> Operator:
    """The operator who asks. Raises ``NotFound`` for anybody else, a write of whom is on record."""
    actor = request.actor
    with ExitStack() as noting:
        if request.method == "POST":
            called = f"{request.method} {request.path}"
            noting.enter_context(audit.denials(actor, "operator.call", "route", called))
        return limit_changes.operator(request.user, actor.address, actor.team)


@require_safe
@console_page
def operator_page(request: ConsoleRequest) -> HttpResponse:
    """Every team with its plan and use, and the plans."""
    who = operator_of(request)
    text = request.GET.get("q", "").strip()
    teams = limit_changes.list_teams(who, text)
    used = counts(teams)
    context = {
        "teams": [(team, used[team.pk]) for team in teams],
        "plans": limit_changes.list_plans(who),
        "q": text,
        "apart": installation.current().mismatch,
    }
    return render(request, "console/operator.html", context)


@require_http_methods(["GET", "HEAD", "POST"])
@console_page
def operator_team(request: ConsoleRequest, team_id: str) -> HttpResponse:
    """One team's plan, and the ceilings agreed with it."""
    who = operator_of(request)
    seen = limit_changes.get_team(who, team_id)
    form = AgreementForm.current(seen.plan_id, getattr(seen, "agreement", None))
    status = 200
    if request.method == "POST":
        form = AgreementForm.typed(request.POST)
        try:
            limit_changes.set_agreement(who, team_id, form.spec())
        except DomainError as error:
            form.take(error)
            status = error.status
        else:
            messages.success(request, f"Limits of {seen.name} saved.")
            return redirect("console:operator_team", team_id)
    held = build(seen)
    used = counts([seen])[seen.pk]
    context = {
        "seen": seen,
        "form": form,
        "plans": limit_changes.list_plans(who),
        "rows": [(held.numbers[n], used.get(n), form.numbers.get(n, "")) for n in KINDS],
    }
    return render(request, "console/operator_team.html", context, status=status)


@require_http_methods(["GET", "HEAD", "POST"])
@console_page
def operator_plan(request: ConsoleRequest, code: str) -> HttpResponse:
    """What a plan allows, for every team on it."""
    who = operator_of(request)
    seen = limit_changes.get_plan(who, code)
    form, status = PlanForm.current(seen), 200
    if request.method == "POST":
        form = PlanForm.typed(request.POST)
        try:
            with limit_changes.refusals(who, "plan.edit", "plan", code):
                spec = form.spec()
            limit_changes.edit_plan(who, code, spec)
        except DomainError as error:
            form.take(error)
            status = error.status
        else:
            messages.success(request, f"Plan {form.name} was saved.")
            return redirect("console:operator")
    context = {
        "seen": seen,
        "form": form,
        "rows": [(name, kind, form.numbers.get(name, "")) for name, kind in KINDS.items()],
        "sizes": SIZES,
    }
    return render(request, "console/operator_plan.html", context, status=status)


@never_cache
@require_http_methods(["GET", "HEAD", "POST"])
@console_page
def operator_team_new(request: ConsoleRequest) -> HttpResponse:
    """A new team, and the link that makes whoever opens it its owner, which is shown once."""
    who = operator_of(request)
    context: dict[str, Any] = {"form": TeamForm(), "plans": limit_changes.list_plans(who)}
    status = 200
    if request.method == "POST":
        form = context["form"] = TeamForm.typed(request.POST)
        try:
            context |= made_team(request, who, form)
        except DomainError as error:
            form.take(error)
            status = error.status
    return render(request, "console/operator_team_new.html", context, status=status)


def made_team(request: ConsoleRequest, who: Operator, form: TeamForm) -> dict[str, Any]:
    """Make the team and its owner's invitation, or neither."""
    with limit_changes.refusals(who, "team.create", "team"), transaction.atomic():
        team = limit_changes.create_team(who, form.spec())
        owner = InviteSpec(role=Role.OWNER, email=form.email)
        invitation, secret = people.invite(who.of(team), owner)
    link = console_address(request) + reverse("console:join", args=[secret])
    return {"made": team, "invitation": invitation, "link": link, "days": people.INVITATION_DAYS}

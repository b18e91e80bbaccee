"""The operator's pages: all teams, plans and agreements."""

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
from orkestr_console.accounts.limits import KINDS, build_envelope
from orkestr_console.accounts.models import Role
from orkestr_console.accounts.people import InviteSpec
from orkestr_console.console.limits_forms import AgreementForm, PlanForm, TeamForm
from orkestr_console.console.limits_views import usage_counts
from orkestr_console.core.addresses import console_address
from orkestr_console.core.errors import DomainError
from orkestr_console.http.decorators import ConsoleRequest, console_page
from orkestr_console.installation import services as installation


def request_operator(request: ConsoleRequest) -> Operator:
    """The request's operator. Raises ``NotFound`` for anybody else, and records their writes."""
    actor = request.actor
    with ExitStack() as stack:
        if request.method == "POST":
            route = f"{request.method} {request.path}"
            stack.enter_context(audit.denials(actor, "operator.call", "route", route))
        return limit_changes.require_operator(request.user, actor.address, actor.team)


@require_safe
@console_page
def operator_page(request: ConsoleRequest) -> HttpResponse:
    """Every team with its plan and usage, and the plans."""
    operator = request_operator(request)
    text = request.GET.get("q", "").strip()
    teams = limit_changes.list_teams(operator, text)
    used = usage_counts(teams)
    context = {
        "teams": [(team, used[team.pk]) for team in teams],
        "plans": limit_changes.list_plans(operator),
        "q": text,
        "apart": installation.current().mismatch,
        "capacity": installation.capacity(),
    }
    return render(request, "console/operator.html", context)


@require_http_methods(["GET", "HEAD", "POST"])
@console_page
def operator_team(request: ConsoleRequest, team_id: str) -> HttpResponse:
    """One team's plan, and the ceilings agreed with it."""
    operator = request_operator(request)
    team = limit_changes.get_team(operator, team_id)
    form = AgreementForm.current(team.plan_id, getattr(team, "agreement", None))
    status = 200
    if request.method == "POST":
        form = AgreementForm.from_post(request.POST)
        try:
            limit_changes.set_agreement(operator, team_id, form.spec())
        except DomainError as error:
            form.add_error(error)
            status = error.status
        else:
            messages.success(request, f"Limits of {team.name} saved.")
            return redirect("console:operator_team", team_id)
    limits = build_envelope(team)
    used = usage_counts([team])[team.pk]
    context = {
        "seen": team,
        "form": form,
        "plans": limit_changes.list_plans(operator),
        "rows": [(limits.numbers[n], used.get(n), form.numbers.get(n, "")) for n in KINDS],
    }
    return render(request, "console/operator_team.html", context, status=status)


@require_http_methods(["GET", "HEAD", "POST"])
@console_page
def operator_plan(request: ConsoleRequest, code: str) -> HttpResponse:
    """What a plan allows, for every team on it."""
    operator = request_operator(request)
    plan = limit_changes.get_plan(operator, code)
    form, status = PlanForm.current(plan), 200
    if request.method == "POST":
        form = PlanForm.from_post(request.POST)
        try:
            with limit_changes.record_refusals(operator, "plan.edit", "plan", code):
                spec = form.spec()
            limit_changes.edit_plan(operator, code, spec)
        except DomainError as error:
            form.add_error(error)
            status = error.status
        else:
            messages.success(request, f"Plan {form.name} was saved.")
            return redirect("console:operator")
    context = {
        "seen": plan,
        "form": form,
        "rows": [(name, kind, form.numbers.get(name, "")) for name, kind in KINDS.items()],
        "sizes": SIZES,
    }
    return render(request, "console/operator_plan.html", context, status=status)


@never_cache
@require_http_methods(["GET", "HEAD", "POST"])
@console_page
def operator_team_new(request: ConsoleRequest) -> HttpResponse:
    """Create a team, and the invitation link for its owner, which is shown once."""
    operator = request_operator(request)
    context: dict[str, Any] = {"form": TeamForm(), "plans": limit_changes.list_plans(operator)}
    status = 200
    if request.method == "POST":
        form = context["form"] = TeamForm.from_post(request.POST)
        try:
            context |= create_team(request, operator, form)
        except DomainError as error:
            form.add_error(error)
            status = error.status
    return render(request, "console/operator_team_new.html", context, status=status)


def create_team(request: ConsoleRequest, operator: Operator, form: TeamForm) -> dict[str, Any]:
    """Create the team and its owner's invitation, or neither."""
    with limit_changes.record_refusals(operator, "team.create", "team"), transaction.atomic():
        team = limit_changes.create_team(operator, form.spec())
        owner = InviteSpec(role=Role.OWNER, email=form.email)
        invitation, secret = people.invite(operator.acting_for(team), owner)
    link = console_address(request) + reverse("console:join", args=[secret])
    return {"made": team, "invitation": invitation, "link": link, "days": people.INVITATION_DAYS}

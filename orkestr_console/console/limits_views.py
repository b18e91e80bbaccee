"""The page of a team's limits: every member sees it, admins can change them."""

from __future__ import annotations

from dataclasses import dataclass

from django.contrib import messages
from django.http import HttpResponse
from django.shortcuts import redirect, render
from django.views.decorators.http import require_http_methods

import sandboxes_app.services as sandboxes
import templates_app.services as templates
from orkestr_console.accounts import limit_changes
from orkestr_console.accounts.limits import (
    KINDS,
    SHARES,
    Envelope,
    Limit,
    envelope,
    networks_of,
)
from orkestr_console.accounts.models import Role, Team
from orkestr_console.console.limits_forms import SHARE_LABELS, LimitsForm
from orkestr_console.core.errors import DomainError
from orkestr_console.http.decorators import ConsoleRequest, console_page
from orkestr_console.webhooks import services as webhooks


@dataclass(frozen=True)
class Row:
    """One limit on the page: ``used`` is None if it is not counted."""

    limit: Limit
    used: int | None
    typed: str

    @property
    def is_full(self) -> bool:
        """Whether the limit is reached."""
        return self.used is not None and self.used >= self.limit.value

    @property
    def is_over(self) -> bool:
        """Whether usage exceeds the limit."""
        return self.used is not None and self.used > self.limit.value


@dataclass(frozen=True)
class Choice:
    """One checkbox."""

    value: str
    label: str
    ticked: bool


@require_http_methods(["GET", "HEAD", "POST"])
@console_page
def limits_page(request: ConsoleRequest) -> HttpResponse:
    """Every limit as a meter. A refused form keeps what was typed."""
    actor = request.actor
    limits = envelope(actor.team, actor.user)
    bases = [base.id for base in templates.list_bases(actor) if base.group == "builtin"]
    offered = {
        "sizes": list(limits.plan.allowed_sizes),
        "networks": networks_of(limits.plan),
        "bases": bases,
    }
    if request.method != "POST":
        return show(request, limits, offered, LimitsForm.current(limits, bases))
    form = LimitsForm.from_post(request.POST)
    try:
        limit_changes.set_team_limits(actor, form.spec(limits, offered))
    except DomainError as error:
        form.add_error(error)
        return show(request, limits, offered, form, error.status)
    messages.success(request, "Limits saved.")
    return redirect("console:limits")


def show(
    request: ConsoleRequest,
    limits: Envelope,
    offered: dict[str, list[str]],
    form: LimitsForm,
    status: int = 200,
) -> HttpResponse:
    """The page."""
    used = usage_counts([request.actor.team])[request.actor.team.pk]
    context = {
        "form": form,
        "held": limits,
        "rows": [Row(limits.numbers[n], used.get(n), form.numbers.get(n, "")) for n in KINDS],
        "shares": [(n, SHARE_LABELS[n], form.shares.get(n, ""), limits.shares[n]) for n in SHARES],
        "groups": [
            ("sizes", "Sizes", choices(offered["sizes"], form.sizes)),
            ("networks", "Networks", choices(offered["networks"], form.networks)),
            ("bases", "Base images", choices(offered["bases"], form.bases)),
        ],
        "may_edit": request.actor.is_at_least(Role.ADMIN),
        "admins": limits.admins(),
    }
    return render(request, "console/limits.html", context, status=status)


def choices(offered: list[str], ticked: list[str]) -> list[Choice]:
    """A checkbox for each option."""
    return [Choice(name, name, name in ticked) for name in offered]


def usage_counts(teams: list[Team]) -> dict[str, dict[str, int]]:
    """Each team's usage of its counted limits, by team id."""
    sandbox_counts, webhook_counts = sandboxes.usage_counts(teams), webhooks.usage_counts(teams)
    return {
        team: {**used, **sandbox_counts[team], **webhook_counts[team]}
        for team, used in templates.usage_counts(teams).items()
    }

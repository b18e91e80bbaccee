"""`manage.py mint_token`: make an API token and print it, and nothing else."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.db import transaction
from django.db.models import Q
from django.utils import timezone

from orkestr_console.accounts import audit
from orkestr_console.accounts.actor import SCOPES, system_actor
from orkestr_console.accounts.api_tokens import record_created
from orkestr_console.accounts.limits import NETWORKS, envelope
from orkestr_console.accounts.models import Team
from orkestr_console.accounts.services import mint_token
from orkestr_console.core.errors import InvalidInput, PlanLimit


class Command(BaseCommand):
    """Make an API token for a team."""

    help = "Create an API token for a team and print it; it can't be shown again."

    def add_arguments(self, parser: CommandParser) -> None:
        """Whose token, what for, and for how long."""
        parser.add_argument("--team", required=True, help="the team's id, slug or name")
        parser.add_argument(
            "--scope", action="append", required=True, help=f"one of {', '.join(SCOPES)}; repeat"
        )
        parser.add_argument("--name", default="Created on the command line")
        parser.add_argument("--days", type=int, help="days until it expires; never if not given")
        parser.add_argument(
            "--network",
            action="append",
            choices=NETWORKS,
            help="networks it can use; repeat; any if not given",
        )
        parser.add_argument(
            "--template",
            action="append",
            help="ids of templates, or bases, it may boot and build from; repeat; any if not given",
        )
        parser.add_argument(
            "--plan-check",
            action="store_true",
            help="create none if the team's plan has no custom templates",
        )

    def handle(self, *args: Any, **options: Any) -> None:
        """Print the token."""
        expires_at = None
        if (days := options["days"]) is not None:
            if days < 1:
                raise CommandError("--days must be at least 1")
            expires_at = timezone.now() + timedelta(days=days)
        team = find_team(options["team"])
        actor = system_actor(team)
        try:
            with audit.denials(actor, "token.create", "token"), transaction.atomic():
                if options["plan_check"]:
                    require_templates(team)
                token, text = mint_token(
                    team,
                    options["name"],
                    options["scope"],
                    expires_at=expires_at,
                    allowed_templates=options["template"],
                    allowed_networks=options["network"],
                )
                record_created(actor, token)
        except (InvalidInput, PlanLimit) as error:
            raise CommandError(error.detail) from None
        self.stdout.write(text)


def require_templates(team: Team) -> None:
    """Raise ``PlanLimit`` for a team whose plan has no custom templates."""
    if envelope(team).value("max_templates") == 0:
        raise PlanLimit(
            f"team '{team.slug}' is on plan {team.plan}, which has no custom templates: "
            "no token was created"
        )


def find_team(word: str) -> Team:
    """The team with this id, slug or name. Raises ``CommandError`` for none, or several."""
    found = list(Team.objects.filter(Q(id=word) | Q(slug=word) | Q(name=word)))
    if len(found) == 1:
        return found[0]
    if found:
        raise CommandError(f"{len(found)} teams are called '{word}': give the id or the slug")
    known = ", ".join(Team.objects.order_by("slug").values_list("slug", flat=True)[:20])
    raise CommandError(f"no team '{word}'; there are: {known or 'none yet'}")

"""The limits of a team and a person: plan, agreement, the admins' own limits, and shares.

A number is resolved from the outside in. The plan sets the ceiling, unless an operator has agreed
another with this team; the team's admins may set their limit anywhere up to it; a person may have a
share of that. Every check of every surface uses an :class:`Envelope`, and one that counts uses that
of :func:`held`, so that no two callers take the same last slot.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, cast

from django.db import connection, models, transaction

from orkestr_console.accounts.models import (
    Agreement,
    Membership,
    Plan,
    Role,
    Team,
    TeamLimits,
    User,
)
from orkestr_console.accounts.turns import taken, turn, wait
from orkestr_console.core.errors import PlanLimit
from orkestr_console.core.hosts import Steps
from orkestr_console.core.rows import columns_sql, quoted, read_row

NETWORKS = ("off", "restricted", "open")


@dataclass(frozen=True)
class LimitKind:
    """What a number limits: its ``label``, its ``unit``, and the words for having reached it."""

    label: str
    unit: str = ""
    # "Your team is using 3 of the 3 templates …; delete one you no longer need"
    things: str = ""
    remedy: str = ""


KINDS: Mapping[str, LimitKind] = {
    "max_templates": LimitKind("Templates", "", "templates", "delete one you no longer need"),
    # Builds above it are queued; one is refused only if the limit is 0.
    "max_concurrent_builds": LimitKind(
        "Concurrent builds", "", "concurrent builds", "use an existing template"
    ),
    "max_concurrent_sandboxes": LimitKind(
        "Concurrent sandboxes", "", "concurrent sandboxes", "terminate one"
    ),
    "max_concurrent_commands": LimitKind(
        "Concurrent commands", "", "concurrent commands", "wait for one to finish"
    ),
    "max_timeout_seconds": LimitKind("Longest sandbox lifetime", "s"),
    "template_disk_mb": LimitKind(
        "Disk for templates", "MB", "megabytes of templates", "delete a template"
    ),
    "step_timeout_seconds": LimitKind("Longest build step", "s"),
    "build_timeout_seconds": LimitKind("Longest build", "s"),
    "max_snapshots": LimitKind(
        "Paused sandboxes", "", "paused sandboxes", "resume or terminate one"
    ),
    "max_named_snapshots": LimitKind("Snapshots", "", "snapshots", "delete one"),
    "snapshot_disk_mb": LimitKind(
        "Disk for snapshots", "MB", "megabytes of snapshots", "delete a snapshot"
    ),
    "max_volumes": LimitKind("Volumes", "", "volumes", "delete one"),
    # The sum of what they may grow to, so that no plan promises the same disk twice.
    "volume_disk_mb": LimitKind(
        "Disk for volumes", "MB", "megabytes of volumes", "delete one, or ask for a smaller one"
    ),
    "max_webhooks": LimitKind("Webhooks", "", "webhooks", "delete one"),
    "api_requests_per_minute": LimitKind("API requests per minute per token"),
}
RELATED = ("plan", "limits", "agreement")
# The limits that have a personal share.
SHARES = ("max_templates", "max_concurrent_sandboxes")
# What a lock comes with, by alias; most teams have no row in the outer joins.
HELD: Mapping[str, type[models.Model]] = {
    "team": Team,
    "plan": Plan,
    "limits": TeamLimits,
    "agreement": Agreement,
    "membership": Membership,
}
HOLD_SQL = """
SELECT {columns} FROM {team} team
JOIN {plan} plan ON plan.code = team.plan_id
LEFT JOIN {limits} limits ON limits.team_id = team.id
LEFT JOIN {agreement} agreement ON agreement.team_id = team.id
LEFT JOIN {membership} membership
    ON membership.team_id = team.id AND membership.user_id = %(user)s::bigint
WHERE team.id = %(team)s FOR UPDATE OF team
"""

SETTLE_SQL = "SELECT pg_advisory_xact_lock(hashtextextended(%s, %s))"
# Separates these locks from others': the bytes of "limit".
SETTLE_SEED = 0x6C696D6974


@dataclass(frozen=True)
class Limit:
    """One number: the ``ceiling``, the team's ``own`` limit below it if any, and their origin."""

    name: str
    ceiling: int
    own: int | None
    agreed: bool

    @property
    def value(self) -> int:
        """The effective number."""
        return self.ceiling if self.own is None else min(self.own, self.ceiling)

    @property
    def set_by(self) -> Literal["plan", "agreement", "team"]:
        """Who set the effective number, and so can raise it."""
        if self.own is not None and self.own < self.ceiling:
            return "team"
        return "agreement" if self.agreed else "plan"

    @property
    def kind(self) -> LimitKind:
        """What it limits, in words."""
        return KINDS[self.name]


@dataclass(frozen=True)
class Envelope:
    """Everything that limits one team, and one person in it."""

    team: Team
    plan: Plan
    numbers: Mapping[str, Limit]
    sizes: tuple[str, ...]
    networks: tuple[str, ...]
    bases: tuple[str, ...] | None
    shares: Mapping[str, int | None]

    def value(self, name: str) -> int:
        """The effective number of a limit."""
        return self.numbers[name].value

    def require_room(self, name: str, used: int, mine: int | None = None) -> None:
        """Raise ``PlanLimit`` unless the team, which uses ``used``, may have one more.

        ``mine`` is the person's own usage, for limits with a personal share.
        """
        limit = self.numbers[name]
        if used >= limit.value:
            raise self._full(limit, used)
        share = self.shares.get(name)
        if share is not None and mine is not None and mine >= share:
            kind = limit.kind
            raise limit_error(
                f"Your personal limit is {share} {kind.things} and you have {mine}; {kind.remedy}, "
                f"or ask {self.admins()} to raise it.",
                name,
                mine,
                share,
            )

    def require_amount(self, name: str, used: int, more: int) -> None:
        """Raise ``PlanLimit`` unless the team, which uses ``used``, may have ``more``."""
        limit, kind = self.numbers[name], self.numbers[name].kind
        if used + more > limit.value:
            raise limit_error(
                f"Your team has {used:,} of the {limit.value:,} {kind.things} that "
                f"{self.who_allows(limit)}, and this needs {more:,}; {kind.remedy}, or "
                f"{self.advice(limit)}",
                name,
                used,
                limit.value,
            )

    def _full(self, limit: Limit, used: int) -> PlanLimit:
        kind, value = limit.kind, limit.value
        if value == 0 and limit.set_by == "plan" and limit.name == "max_templates":
            return limit_error(
                f"Custom templates are not part of the {self.plan.name} plan; ask your "
                "administrator to move the team to a paid plan.",
                limit.name,
                used,
                value,
            )
        return limit_error(
            f"Your team is using {used:,} of the {value:,} {kind.things} that "
            f"{self.who_allows(limit)}; {kind.remedy}, or {self.advice(limit)}",
            limit.name,
            used,
            value,
        )

    def require_at_most(self, name: str, wanted: int, field: str) -> None:
        """Raise ``PlanLimit`` naming ``field`` if ``wanted`` exceeds the limit."""
        limit = self.numbers[name]
        if wanted > limit.value:
            raise limit_error(
                f"{field}: at most {limit.value} is what {self.who_allows(limit)}; ask for "
                f"less, or {self.advice(limit)}",
                name,
                wanted,
                limit.value,
            )

    def require_size(self, size: str) -> None:
        """Raise ``PlanLimit`` unless sandboxes may be of this size."""
        if size not in self.sizes:
            self._refuse_choice("size", size, self.sizes, self.plan.allowed_sizes)

    def require_network(self, network: str) -> None:
        """Raise ``PlanLimit`` unless this network may be used."""
        if network not in self.networks:
            self._refuse_choice("network", network, self.networks, networks_of(self.plan))

    def require_base(self, base: str) -> None:
        """Raise ``PlanLimit`` unless this built-in base may be used."""
        if self.bases is not None and base not in self.bases:
            self._refuse_choice("base image", base, self.bases, [base])

    def require_allowlist(self) -> None:
        """Raise ``PlanLimit`` unless the plan has custom egress allowlists."""
        if not self.plan.custom_egress_allowlist:
            raise PlanLimit(
                f"allow_domains: {self.default_list_alone}; leave "
                "it out, or ask your administrator for a larger plan."
            )

    @property
    def default_list_alone(self) -> str:
        """That the plan has no custom egress allowlists, as the start of a sentence."""
        return f"the {self.plan.name} plan has the default allowlist only"

    @property
    def may_list(self) -> bool:
        """Whether a host can be allowed by naming it."""
        return self.plan.custom_egress_allowlist and "restricted" in self.networks

    @property
    def may_open(self) -> bool:
        """Whether the open network can be used."""
        return "open" in self.networks

    @property
    def why_not_open(self) -> str:
        """Why the open network cannot be used, in a sentence; blank if it can."""
        if self.may_open:
            return ""
        if self.plan.allow_open_network:
            return "Not allowed by your team's admins."
        return f"Not part of the {self.plan.name} plan."

    def allowlist_alternatives(self) -> str:
        """The alternatives for a host that cannot be allowed by name, in two sentences."""
        why, ask = self.default_list_alone, "ask your administrator for a larger plan"
        if "restricted" not in self.networks:
            why, ask = "your team's admins do not allow the network 'restricted'", ""
        elif not self.may_open and "open" in networks_of(self.plan):
            ask = f"ask {self.admins()} to allow the network 'open'"
        options = [
            "Fetch what is needed from a host on the default list" if ask else "",
            "build with network 'open'" if self.may_open else "",
            ask or f"ask {self.admins()}",
        ]
        alternatives = ", or ".join(way for way in options if way)
        return f"{why[:1].upper()}{why[1:]}. {alternatives[:1].upper()}{alternatives[1:]}."

    def _refuse_choice(
        self, what: str, asked: str, allowed: Sequence[str], planned: Sequence[str]
    ) -> None:
        others = f"use {', '.join(allowed)}" if allowed else "there is no other"
        if asked in planned:
            raise PlanLimit(
                f"Your team's admins do not allow the {what} '{asked}'; {others}, or ask "
                f"{self.admins()}."
            )
        raise PlanLimit(
            f"The {self.plan.name} plan does not include the {what} '{asked}'; {others}, or ask "
            "your administrator for a larger plan."
        )

    def who_allows(self, limit: Limit) -> str:
        """Who set the limit, in words that follow "that"."""
        return {
            "team": "your team's admins allow",
            "agreement": "was agreed for your team",
            "plan": f"the {self.plan.name} plan allows",
        }[limit.set_by]

    def advice(self, limit: Limit) -> str:
        """Whom to ask, as the end of a sentence."""
        if limit.set_by == "team":
            return f"ask {self.admins()} to raise the limit."
        return "ask your administrator for a larger plan."

    def admins(self) -> str:
        """Who can change the team's limits, by name; queried only for messages."""
        people = (
            Membership.objects.filter(team=self.team, role__in=[Role.ADMIN, Role.OWNER])
            .select_related("user")
            .order_by("created_at")[:3]
        )
        names = " or ".join(f"{m.user.get_full_name()} ({m.user.email})" for m in people)
        return names or "an admin of your team"


def limit_error(detail: str, name: str, used: int, limit: int) -> PlanLimit:
    """The error, with the numbers in machine-readable form."""
    return PlanLimit(detail, extra={"limit": name, "used": used, "max": limit})


def envelope(team: Team, user: User | None = None) -> Envelope:
    """The current limits of ``team``, and of ``user`` in it."""
    return build_envelope(Team.objects.select_related(*RELATED).get(pk=team.pk), user)


def hold(team: Team, user: User | None = None) -> Envelope:
    """The same, with the team's row locked until the caller's transaction ends.

    Counting against a limit and taking a slot must both happen under this lock, and in statements
    of their own: one sees what was committed when it began to wait. Who does so often uses
    :func:`held`. Raises ``Team.DoesNotExist``.
    """
    with connection.cursor() as cursor:
        cursor.execute(hold_sql(), {"team": team.pk, "user": user.pk if user else None})
        row = cursor.fetchone()
    if row is None:
        raise Team.DoesNotExist
    values = iter(row)
    rows = {alias: read_row(model, values) for alias, model in HELD.items()}
    membership = rows.pop("membership")
    return make_envelope(link_team(**rows), user, membership)


@cache
def hold_sql() -> str:
    """The statement of :func:`hold`."""
    return HOLD_SQL.format(
        columns=columns_sql(tuple(HELD.items())),
        **{alias: quoted(model._meta.db_table) for alias, model in HELD.items()},
    )


def link_team(*, team: Any, plan: Any, limits: Any, agreement: Any) -> Team:
    """A team with its related rows in place, as ``select_related`` leaves them."""
    team.plan = plan
    for name, row in (("limits", limits), ("agreement", agreement)):
        Team._meta.get_field(name).set_cached_value(team, row)  # type: ignore[union-attr]
        if row is not None:
            row.team = team
    return cast("Team", team)


@contextmanager
def held(team: Team, user: User | None = None) -> Iterator[Envelope]:
    """A transaction with the team's row locked; callers of one process take turns."""
    with turn(team.pk), transaction.atomic():
        yield hold(team, user)


def wait_for_turn(team: Team) -> Steps[None]:
    """The step before :func:`held_in_turn`, for services in steps."""
    return wait(team.pk)


@contextmanager
def held_in_turn(team: Team, user: User | None = None) -> Iterator[Envelope]:
    """The same as :func:`held` for who has waited for its turn, and does it at once."""
    with taken(team.pk), transaction.atomic():
        yield hold(team, user)


@contextmanager
def settling(team: Team, name: str) -> Iterator[Envelope]:
    """A transaction in which nobody else settles what counts against one of the team's limits.

    For what has a size only once it has been made: several that were made at the same time are
    counted one after the other. Unlike :func:`hold`, it locks no row, so the caller may have locked
    others; what deletes one waits for the team's row with that one locked.
    """
    with transaction.atomic():
        with connection.cursor() as cursor:
            cursor.execute(SETTLE_SQL, [f"{name} of {team.pk}", SETTLE_SEED])
        yield envelope(team)


def build_envelope(team: Team, user: User | None = None) -> Envelope:
    """The envelope from rows already read, but for a person's membership."""
    # Not .none(): Django makes a query even of that.
    membership = Membership.objects.filter(team=team, user=user).first() if user else None
    return make_envelope(team, user, membership)


def limit_of(team: Team, name: str) -> int:
    """One of the team's numbers, from rows already read, for who needs no other."""
    return effective_limit(name, team.plan, *agreed_and_own(team)).value


def make_envelope(team: Team, user: User | None, membership: Membership | None) -> Envelope:
    """The envelope from rows already read."""
    plan = team.plan
    agreement, own = agreed_and_own(team)
    return Envelope(
        team=team,
        plan=plan,
        numbers={name: effective_limit(name, plan, agreement, own) for name in KINDS},
        sizes=restrict(plan.allowed_sizes, own.allowed_sizes if own else None),
        networks=restrict(networks_of(plan), own.allowed_networks if own else None),
        bases=tuple(own.allowed_bases) if own and own.allowed_bases is not None else None,
        shares=shares_of(user, membership, own),
    )


def agreed_and_own(team: Team) -> tuple[Agreement | None, TeamLimits | None]:
    """What was agreed with the team, and its own limits, from rows already read."""
    return getattr(team, "agreement", None), getattr(team, "limits", None)


def effective_limit(
    name: str, plan: Plan, agreement: Agreement | None, own: TeamLimits | None
) -> Limit:
    """One number, resolved from agreement, plan and own limit."""
    agreed = getattr(agreement, name, None)
    ceiling = int(getattr(plan, name) if agreed is None else agreed)
    return Limit(name, ceiling, getattr(own, name, None), agreed is not None)


def restrict(offered: Sequence[str], allowed: Sequence[str] | None) -> tuple[str, ...]:
    """What the plan offers, without what the team's admins exclude."""
    return tuple(name for name in offered if allowed is None or name in allowed)


def networks_of(plan: Plan) -> list[str]:
    """The networks a plan includes."""
    return [name for name in NETWORKS if name != "open" or plan.allow_open_network]


def shares_of(
    user: User | None, membership: Membership | None, own: TeamLimits | None
) -> dict[str, int | None]:
    """The person's share of each limit in ``SHARES``; None without one."""
    team_shares = {name: getattr(own, f"member_{name}", None) for name in SHARES}
    if user is None:
        return dict.fromkeys(SHARES)
    if membership is None:
        return team_shares
    own_shares = {name: getattr(membership, name) for name in SHARES}
    return {
        name: team_shares[name] if own_shares[name] is None else own_shares[name] for name in SHARES
    }

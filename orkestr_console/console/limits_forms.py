"""The forms of limits, plans and tokens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from django.http import QueryDict

from orkestr_console.accounts.actor import READ, SCOPES, WRITE
from orkestr_console.accounts.api_tokens import TokenSpec
from orkestr_console.accounts.limit_changes import (
    AgreementSpec,
    LimitsSpec,
    NewTeamSpec,
    PlanSpec,
)
from orkestr_console.accounts.limits import KINDS, SHARES, Envelope
from orkestr_console.accounts.models import Agreement, Plan, TeamLimits
from orkestr_console.accounts.people import usable_email
from orkestr_console.core.errors import DomainError, InvalidInput
from orkestr_console.http.validation import parse_spec
from orkestr_console.ui.forms import Form

SHARE_LABELS = {
    "max_templates": "Templates per person",
    "max_concurrent_sandboxes": "Concurrent sandboxes per person",
}
NUMBER_LABELS = {name: kind.label for name, kind in KINDS.items()}


def numbers_typed(data: QueryDict, names: Iterable[str], prefix: str = "") -> dict[str, str]:
    """What was typed for each number."""
    return {name: data.get(f"{prefix}{name}", "").strip() for name in names}


def or_none(typed: Mapping[str, str]) -> dict[str, Any]:
    """Blank is None; pydantic reads the rest."""
    return {name: text or None for name, text in typed.items()}


def in_form(row: object, names: Iterable[str], prefix: str = "") -> dict[str, str]:
    """A row's numbers as a form shows them."""
    values = {name: getattr(row, f"{prefix}{name}", None) for name in names}
    return {name: "" if value is None else str(value) for name, value in values.items()}


def without_path(error: DomainError) -> DomainError:
    """``numbers.max_templates`` is typed in the field ``max_templates``."""
    found = error.fields or {}
    return InvalidInput(
        error.detail,
        fields={
            name.removeprefix("numbers.").replace("shares.", "share_"): sentence
            for name, sentence in found.items()
        },
    )


@dataclass
class LimitsForm(Form):
    """What the team's admins set."""

    numbers: dict[str, str] = field(default_factory=dict)
    shares: dict[str, str] = field(default_factory=dict)
    sizes: list[str] = field(default_factory=list)
    networks: list[str] = field(default_factory=list)
    bases: list[str] = field(default_factory=list)

    labels: ClassVar[Mapping[str, str]] = {
        **NUMBER_LABELS,
        **{f"share_{name}": label for name, label in SHARE_LABELS.items()},
        "sizes": "Sizes",
        "networks": "Networks",
        "bases": "Base images",
    }

    @classmethod
    def current(cls, held: Envelope, bases: list[str]) -> LimitsForm:
        """The form as the limits are now."""
        own = getattr(held.team, "limits", None) or TeamLimits(team=held.team)
        return cls(
            numbers=in_form(own, KINDS),
            shares=in_form(own, SHARES, "member_"),
            sizes=list(held.sizes),
            networks=list(held.networks),
            bases=bases if held.bases is None else list(held.bases),
        )

    @classmethod
    def typed(cls, data: QueryDict) -> LimitsForm:
        """What was posted."""
        return cls(
            numbers=numbers_typed(data, KINDS),
            shares=numbers_typed(data, SHARES, "share_"),
            sizes=data.getlist("sizes"),
            networks=data.getlist("networks"),
            bases=data.getlist("bases"),
        )

    def spec(self, held: Envelope, offered: Mapping[str, list[str]]) -> LimitsSpec:
        """What is asked for. All that is offered is chosen: then what comes later is, too.

        Where the bases cannot be listed just now, they stay as they are.
        """
        chosen = {
            name: None if set(known) <= set(picked) else picked
            for name, known, picked in (
                ("sizes", offered["sizes"], self.sizes),
                ("networks", offered["networks"], self.networks),
                ("bases", offered["bases"], self.bases),
            )
        }
        if not offered["bases"]:
            chosen["bases"] = None if held.bases is None else list(held.bases)
        numbers = {"numbers": or_none(self.numbers), "shares": or_none(self.shares)}
        return parse_spec(LimitsSpec, {**numbers, **chosen})

    def take(self, error: DomainError) -> None:
        """As any form."""
        super().take(without_path(error))


@dataclass
class AgreementForm(Form):
    """A team's plan, and what was agreed beyond it."""

    plan: str = ""
    numbers: dict[str, str] = field(default_factory=dict)
    note: str = ""

    labels: ClassVar[Mapping[str, str]] = {**NUMBER_LABELS, "plan": "The plan", "note": "The note"}

    @classmethod
    def current(cls, plan: str, agreement: Agreement | None) -> AgreementForm:
        """The form as it is now."""
        return cls(plan, in_form(agreement, KINDS), agreement.note if agreement else "")

    @classmethod
    def typed(cls, data: QueryDict) -> AgreementForm:
        """What was posted."""
        return cls(data.get("plan", ""), numbers_typed(data, KINDS), data.get("note", "").strip())

    def spec(self) -> AgreementSpec:
        """What is asked for. Raises ``InvalidInput``."""
        self.refuse_unusable()
        asked = {"plan": self.plan, "numbers": or_none(self.numbers), "note": self.note}
        return parse_spec(AgreementSpec, asked)

    def take(self, error: DomainError) -> None:
        """As any form."""
        super().take(without_path(error))


@dataclass
class PlanForm(Form):
    """What a plan allows."""

    name: str = ""
    numbers: dict[str, str] = field(default_factory=dict)
    sizes: list[str] = field(default_factory=list)
    allow_open_network: bool = False
    custom_egress_allowlist: bool = False

    labels: ClassVar[Mapping[str, str]] = {**NUMBER_LABELS, "name": "The name", "sizes": "Sizes"}

    @classmethod
    def current(cls, plan: Plan) -> PlanForm:
        """The form as the plan is now."""
        switches = (plan.allow_open_network, plan.custom_egress_allowlist)
        return cls(plan.name, in_form(plan, KINDS), list(plan.allowed_sizes), *switches)

    @classmethod
    def typed(cls, data: QueryDict) -> PlanForm:
        """What was posted."""
        return cls(
            data.get("name", "").strip(),
            numbers_typed(data, KINDS),
            data.getlist("sizes"),
            "allow_open_network" in data,
            "custom_egress_allowlist" in data,
        )

    def spec(self) -> PlanSpec:
        """What is asked for. Raises ``InvalidInput``."""
        self.refuse_unusable()
        return parse_spec(
            PlanSpec,
            {
                "name": self.name,
                "numbers": self.numbers,
                "sizes": self.sizes,
                "allow_open_network": self.allow_open_network,
                "custom_egress_allowlist": self.custom_egress_allowlist,
            },
        )

    def take(self, error: DomainError) -> None:
        """As any form."""
        super().take(without_path(error))


@dataclass
class TeamForm(Form):
    """A new team, and who will own it."""

    name: str = ""
    plan: str = "free"
    email: str = ""

    labels: ClassVar[Mapping[str, str]] = {
        "name": "The name",
        "plan": "The plan",
        "email": "The owner's email address",
    }

    @classmethod
    def typed(cls, data: QueryDict) -> TeamForm:
        """What was posted."""
        return cls(data.get("name", ""), data.get("plan", ""), data.get("email", "").strip())

    def spec(self) -> NewTeamSpec:
        """What is asked for. Raises ``InvalidInput``."""
        self.refuse_unusable()
        if self.email:
            self.email = usable_email(self.email)
        return parse_spec(NewTeamSpec, {"name": self.name, "plan": self.plan})


@dataclass
class TokenForm(Form):
    """A new API token."""

    name: str = ""
    scopes: list[str] = field(default_factory=lambda: [READ, WRITE])
    days: str = "90"
    restrict_templates: bool = False
    templates: list[str] = field(default_factory=list)
    restrict_networks: bool = False
    networks: list[str] = field(default_factory=list)

    labels: ClassVar[Mapping[str, str]] = {
        "name": "The name",
        "scopes": "Scopes",
        "days": "The number of days",
        "templates": "Templates",
        "networks": "Networks",
    }

    @classmethod
    def typed(cls, data: QueryDict) -> TokenForm:
        """What was posted."""
        return cls(
            data.get("name", ""),
            [scope for scope in data.getlist("scopes") if scope in SCOPES],
            data.get("days", "").strip(),
            "restrict_templates" in data,
            data.getlist("templates"),
            "restrict_networks" in data,
            data.getlist("networks"),
        )

    def spec(self, known_templates: Iterable[str]) -> TokenSpec:
        """What is asked for. Raises ``InvalidInput``."""
        self.refuse_unusable()
        if self.restrict_templates and not set(self.templates) <= set(known_templates):
            problem = "includes one that no longer exists; choose again."
            raise InvalidInput(f"templates {problem}", fields={"templates": problem})
        return parse_spec(
            TokenSpec,
            {
                "name": self.name,
                "scopes": self.scopes,
                "days": self.days or None,
                "templates": self.templates if self.restrict_templates else None,
                "networks": self.networks if self.restrict_networks else None,
            },
        )


@dataclass
class AgentForm(Form):
    """A token for one agent; ``client`` is the guide that it was asked for from."""

    name: str = "agent"
    access: str = "write"
    client: str = ""

    labels: ClassVar[Mapping[str, str]] = {"name": "The name", "access": "Permissions"}
    scopes: ClassVar[Mapping[str, list[str]]] = {"read": [READ], "write": [READ, WRITE]}
    days: ClassVar[int] = 90

    @classmethod
    def typed(cls, data: QueryDict) -> AgentForm:
        """What was posted."""
        return cls(data.get("name", ""), data.get("access", ""), data.get("client", ""))

    def spec(self) -> TokenSpec:
        """What is asked for. Raises ``InvalidInput``."""
        self.refuse_unusable()
        if self.access not in self.scopes:
            problem = "must be chosen: read, or read and write."
            raise InvalidInput(f"access {problem}", fields={"access": problem})
        asked = {"name": self.name, "scopes": self.scopes[self.access], "days": self.days}
        return parse_spec(TokenSpec, asked)

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
from orkestr_console.accounts.people import normalize_email
from orkestr_console.core.errors import DomainError, InvalidInput
from orkestr_console.http.validation import parse_spec
from orkestr_console.ui.forms import Form

SHARE_LABELS = {
    "max_templates": "Templates per person",
    "max_concurrent_sandboxes": "Concurrent sandboxes per person",
}
NUMBER_LABELS = {name: kind.label for name, kind in KINDS.items()}


def posted_numbers(data: QueryDict, names: Iterable[str], prefix: str = "") -> dict[str, str]:
    """The text posted for each number."""
    return {name: data.get(f"{prefix}{name}", "").strip() for name in names}


def blank_to_none(typed: Mapping[str, str]) -> dict[str, Any]:
    """The same with None for blanks; pydantic parses the rest."""
    return {name: text or None for name, text in typed.items()}


def form_numbers(row: object, names: Iterable[str], prefix: str = "") -> dict[str, str]:
    """A row's numbers as form values."""
    values = {name: getattr(row, f"{prefix}{name}", None) for name in names}
    return {name: "" if value is None else str(value) for name, value in values.items()}


def flatten_fields(error: DomainError) -> DomainError:
    """The error with form field names: ``numbers.max_templates`` is ``max_templates``."""
    fields = error.fields or {}
    return InvalidInput(
        error.detail,
        fields={
            name.removeprefix("numbers.").replace("shares.", "share_"): sentence
            for name, sentence in fields.items()
        },
    )


@dataclass
class LimitsForm(Form):
    """The limits that a team's admins set."""

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
    def current(cls, limits: Envelope, bases: list[str]) -> LimitsForm:
        """A form with the current limits."""
        own = getattr(limits.team, "limits", None) or TeamLimits(team=limits.team)
        return cls(
            numbers=form_numbers(own, KINDS),
            shares=form_numbers(own, SHARES, "member_"),
            sizes=list(limits.sizes),
            networks=list(limits.networks),
            bases=bases if limits.bases is None else list(limits.bases),
        )

    @classmethod
    def from_post(cls, data: QueryDict) -> LimitsForm:
        """A form from posted data."""
        return cls(
            numbers=posted_numbers(data, KINDS),
            shares=posted_numbers(data, SHARES, "share_"),
            sizes=data.getlist("sizes"),
            networks=data.getlist("networks"),
            bases=data.getlist("bases"),
        )

    def spec(self, limits: Envelope, offered: Mapping[str, list[str]]) -> LimitsSpec:
        """The validated request. Choosing all options means None, which includes future ones.

        If the bases cannot be listed now, they stay as they are.
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
            chosen["bases"] = None if limits.bases is None else list(limits.bases)
        numbers = {"numbers": blank_to_none(self.numbers), "shares": blank_to_none(self.shares)}
        return parse_spec(LimitsSpec, {**numbers, **chosen})

    def add_error(self, error: DomainError) -> None:
        """As any form does, with flat field names."""
        super().add_error(flatten_fields(error))


@dataclass
class AgreementForm(Form):
    """A team's plan, and the ceilings agreed with it."""

    plan: str = ""
    numbers: dict[str, str] = field(default_factory=dict)
    note: str = ""

    labels: ClassVar[Mapping[str, str]] = {**NUMBER_LABELS, "plan": "The plan", "note": "The note"}

    @classmethod
    def current(cls, plan: str, agreement: Agreement | None) -> AgreementForm:
        """A form with the current agreement."""
        return cls(plan, form_numbers(agreement, KINDS), agreement.note if agreement else "")

    @classmethod
    def from_post(cls, data: QueryDict) -> AgreementForm:
        """A form from posted data."""
        return cls(data.get("plan", ""), posted_numbers(data, KINDS), data.get("note", "").strip())

    def spec(self) -> AgreementSpec:
        """The validated request. Raises ``InvalidInput``."""
        self.reject_unusable()
        data = {"plan": self.plan, "numbers": blank_to_none(self.numbers), "note": self.note}
        return parse_spec(AgreementSpec, data)

    def add_error(self, error: DomainError) -> None:
        """As any form does, with flat field names."""
        super().add_error(flatten_fields(error))


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
        """A form with the current plan."""
        switches = (plan.allow_open_network, plan.custom_egress_allowlist)
        return cls(plan.name, form_numbers(plan, KINDS), list(plan.allowed_sizes), *switches)

    @classmethod
    def from_post(cls, data: QueryDict) -> PlanForm:
        """A form from posted data."""
        return cls(
            data.get("name", "").strip(),
            posted_numbers(data, KINDS),
            data.getlist("sizes"),
            "allow_open_network" in data,
            "custom_egress_allowlist" in data,
        )

    def spec(self) -> PlanSpec:
        """The validated request. Raises ``InvalidInput``."""
        self.reject_unusable()
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

    def add_error(self, error: DomainError) -> None:
        """As any form does, with flat field names."""
        super().add_error(flatten_fields(error))


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
    def from_post(cls, data: QueryDict) -> TeamForm:
        """A form from posted data."""
        return cls(data.get("name", ""), data.get("plan", ""), data.get("email", "").strip())

    def spec(self) -> NewTeamSpec:
        """The validated request. Raises ``InvalidInput``."""
        self.reject_unusable()
        if self.email:
            self.email = normalize_email(self.email)
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
    def from_post(cls, data: QueryDict) -> TokenForm:
        """A form from posted data."""
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
        """The validated request. Raises ``InvalidInput``."""
        self.reject_unusable()
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
    """A token for one agent; ``client`` is the guide that the form was sent from."""

    name: str = "agent"
    access: str = "write"
    client: str = ""

    labels: ClassVar[Mapping[str, str]] = {"name": "The name", "access": "Permissions"}
    scopes: ClassVar[Mapping[str, list[str]]] = {"read": [READ], "write": [READ, WRITE]}
    days: ClassVar[int] = 90

    @classmethod
    def from_post(cls, data: QueryDict) -> AgentForm:
        """A form from posted data."""
        return cls(data.get("name", ""), data.get("access", ""), data.get("client", ""))

    def spec(self) -> TokenSpec:
        """The validated request. Raises ``InvalidInput``."""
        self.reject_unusable()
        if self.access not in self.scopes:
            problem = "must be chosen: read, or read and write."
            raise InvalidInput(f"access {problem}", fields={"access": problem})
        data = {"name": self.name, "scopes": self.scopes[self.access], "days": self.days}
        return parse_spec(TokenSpec, data)

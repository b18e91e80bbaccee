"""The forms of people, invitations and accounts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from django.http import QueryDict

from orkestr_console.accounts.models import Membership, Role
from orkestr_console.accounts.people import InviteSpec, NewPersonSpec, ShareSpec
from orkestr_console.http.validation import parse_spec
from orkestr_console.ui.forms import Form


@dataclass
class InviteForm(Form):
    """Whom to invite, and their role."""

    role: str = Role.MEMBER.value
    email: str = ""

    labels: ClassVar[Mapping[str, str]] = {"role": "The role", "email": "The email address"}

    @classmethod
    def from_post(cls, data: QueryDict) -> InviteForm:
        """A form from posted data."""
        return cls(data.get("role", ""), data.get("email", ""))

    def spec(self) -> InviteSpec:
        """The validated request. Raises ``InvalidInput``."""
        self.reject_unusable()
        return parse_spec(InviteSpec, {"role": self.role, "email": self.email})


@dataclass
class ShareForm(Form):
    """One person's share; blank for the team's default."""

    max_templates: str = ""
    max_concurrent_sandboxes: str = ""

    labels: ClassVar[Mapping[str, str]] = {
        "max_templates": "Templates",
        "max_concurrent_sandboxes": "Concurrent sandboxes",
    }

    @classmethod
    def current(cls, place: Membership) -> ShareForm:
        """As it is now."""
        values = (place.max_templates, place.max_concurrent_sandboxes)
        return cls(*("" if value is None else str(value) for value in values))

    @classmethod
    def from_post(cls, data: QueryDict) -> ShareForm:
        """A form from posted data."""
        return cls(*(data.get(name, "").strip() for name in cls.labels))

    def spec(self) -> ShareSpec:
        """The validated request. Raises ``InvalidInput``."""
        return parse_spec(ShareSpec, {name: getattr(self, name) or None for name in self.labels})


@dataclass
class JoinForm(Form):
    """A new account. The password is never shown again."""

    name: str = ""
    email: str = ""
    password: str = ""

    labels: ClassVar[Mapping[str, str]] = {
        "name": "Your name",
        "email": "The email address",
        "password": "The password",
    }

    @classmethod
    def from_post(cls, data: QueryDict) -> JoinForm:
        """A form from posted data."""
        return cls(data.get("name", ""), data.get("email", ""), data.get("password", ""))

    def spec(self) -> NewPersonSpec:
        """The validated request. Raises ``InvalidInput``."""
        self.reject_unusable()
        return parse_spec(NewPersonSpec, {"name": self.name, "email": self.email})

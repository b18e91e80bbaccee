"""People, teams, and who is in which."""

from __future__ import annotations

from typing import Any, ClassVar

from django.contrib.auth.base_user import AbstractBaseUser, BaseUserManager
from django.contrib.auth.models import PermissionsMixin
from django.db import models
from django.db.models.functions import Lower
from django.utils import timezone

from orkestr_console.accounts.models.plans import Plan
from orkestr_console.core.ids import new_id


class UserManager(BaseUserManager["User"]):
    """Creates people; email addresses are stored in lower case, so that case doesn't matter."""

    def create_user(self, email: str, password: str | None = None, **fields: Any) -> User:
        """A person who signs in with ``email``. Raises ``ValueError`` for a blank address."""
        if not email.strip():
            raise ValueError("A person needs an email address.")
        user = self.model(email=email.strip().lower(), **fields)
        user.set_password(password)
        user.save(using=self._db)
        return user

    def create_superuser(self, email: str, password: str | None = None, **fields: Any) -> User:
        """An operator, for ``manage.py createsuperuser``."""
        return self.create_user(email, password, is_staff=True, is_superuser=True, **fields)

    def get_by_natural_key(self, username: str | None) -> User:
        """Find a person whatever the case of the typed address."""
        return self.get(email=(username or "").strip().lower())


class User(AbstractBaseUser, PermissionsMixin):
    """A person. ``is_staff`` makes an operator, who sees every team."""

    email = models.EmailField(max_length=254, unique=True)
    name = models.CharField(max_length=100, blank=True)
    is_staff = models.BooleanField(default=False)
    is_active = models.BooleanField(default=True)
    created_at = models.DateTimeField(default=timezone.now, editable=False)

    objects: ClassVar[UserManager] = UserManager()

    USERNAME_FIELD = "email"
    REQUIRED_FIELDS: ClassVar[list[str]] = []

    class Meta:
        constraints: ClassVar[list[models.BaseConstraint]] = [
            models.UniqueConstraint(Lower("email"), name="user_email_unique_whatever_case"),
        ]

    def __str__(self) -> str:
        return self.email

    def get_full_name(self) -> str:
        """The person's display name."""
        return self.name or self.email

    def get_short_name(self) -> str:
        """The first word of the name, or the email address."""
        return self.name.split(" ")[0] if self.name else self.email


def new_team_id() -> str:
    """A new team id. A function, so that migrations can refer to it."""
    return new_id("team")


class Team(models.Model):
    """The owner of templates and sandboxes, with the plan that limits them."""

    id = models.CharField(max_length=40, primary_key=True, default=new_team_id, editable=False)
    name = models.CharField(max_length=100)
    slug = models.SlugField(max_length=60, unique=True)
    plan = models.ForeignKey(Plan, on_delete=models.PROTECT, related_name="teams")
    created_at = models.DateTimeField(default=timezone.now, editable=False)
    members = models.ManyToManyField(User, through="Membership", related_name="teams")

    def __str__(self) -> str:
        return self.name


class Role(models.TextChoices):
    """A person's role in a team; each includes the ones before it."""

    MEMBER = "member", "Member"
    ADMIN = "admin", "Admin"
    OWNER = "owner", "Owner"

    @property
    def rank(self) -> int:
        """The role's rank: a higher one includes lower ones."""
        return list(Role).index(self)


class Membership(models.Model):
    """A person's membership of a team."""

    user = models.ForeignKey(User, on_delete=models.CASCADE, related_name="memberships")
    team = models.ForeignKey(Team, on_delete=models.CASCADE, related_name="memberships")
    role = models.CharField(max_length=16, choices=Role.choices, default=Role.MEMBER)
    # This person's share of the team's limits; without one, the team's share for everybody.
    max_templates = models.PositiveIntegerField(null=True, blank=True)
    max_concurrent_sandboxes = models.PositiveIntegerField(null=True, blank=True)
    created_at = models.DateTimeField(default=timezone.now, editable=False)

    class Meta:
        constraints: ClassVar[list[models.BaseConstraint]] = [
            models.UniqueConstraint(fields=["user", "team"], name="one_membership_per_team"),
            models.CheckConstraint(
                condition=models.Q(role__in=Role.values), name="membership_role_is_known"
            ),
        ]

    def __str__(self) -> str:
        return f"{self.user} is {self.role} of {self.team}"


def new_invitation_id() -> str:
    """A new invitation id. A function, so that migrations can refer to it."""
    return new_id("inv")


class Invitation(models.Model):
    """A link that makes whoever opens it a member. Only a digest of its secret is stored."""

    id = models.CharField(
        max_length=40, primary_key=True, default=new_invitation_id, editable=False
    )
    team = models.ForeignKey(Team, on_delete=models.CASCADE, related_name="invitations")
    role = models.CharField(max_length=16, choices=Role.choices, default=Role.MEMBER)
    # The only person who can accept it. Blank: anybody with the link.
    email = models.EmailField(max_length=254, blank=True, default="")
    digest = models.CharField(max_length=64, unique=True, editable=False)
    created_by = models.ForeignKey(
        User, on_delete=models.SET_NULL, null=True, blank=True, related_name="invitations"
    )
    created_at = models.DateTimeField(default=timezone.now, editable=False)
    expires_at = models.DateTimeField()
    accepted_at = models.DateTimeField(null=True, blank=True)
    accepted_by = models.ForeignKey(
        User, on_delete=models.SET_NULL, null=True, blank=True, related_name="+"
    )
    revoked_at = models.DateTimeField(null=True, blank=True)

    class Meta:
        indexes: ClassVar[list[models.Index]] = [models.Index(fields=["team", "-created_at"])]

    def __str__(self) -> str:
        return f"{self.role} of {self.team_id}"

    def is_open(self) -> bool:
        """Whether it can still be accepted."""
        ended = self.accepted_at is not None or self.revoked_at is not None
        return not ended and self.expires_at > timezone.now()


class SignedIn(models.Model):
    """A signed-in browser, as the page of sessions lists it."""

    user = models.ForeignKey(User, on_delete=models.CASCADE, related_name="sign_ins")
    session_key = models.CharField(max_length=40, unique=True)
    address = models.CharField(max_length=64, blank=True, default="")
    user_agent = models.CharField(max_length=300, blank=True, default="")
    created_at = models.DateTimeField(default=timezone.now, editable=False)
    seen_at = models.DateTimeField(default=timezone.now)

    def __str__(self) -> str:
        return f"{self.user} from {self.address}"

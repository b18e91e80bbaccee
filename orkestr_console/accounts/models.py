"""People, teams, plans and API tokens."""

from __future__ import annotations

from typing import Any, ClassVar

from django.contrib.auth.base_user import AbstractBaseUser, BaseUserManager
from django.contrib.auth.models import PermissionsMixin
from django.core.validators import MaxValueValidator, MinValueValidator
from django.db import models
from django.db.models.functions import Lower
from django.utils import timezone

from orkestr_console.ids import new_id

# The queue gives a build this long and a margin (settings.Q_CLUSTER), so no plan may allow more.
LONGEST_BUILD_SECONDS = 6 * 3600


class UserManager(BaseUserManager["User"]):
    """Makes people; the email address is kept in lower case so that it is unique as typed."""

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
        """Sign-in finds a person whatever the case of the address they typed."""
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
        """What the console calls the person."""
        return self.name or self.email

    def get_short_name(self) -> str:
        """The same, shorter where there is a name."""
        return self.name.split(" ")[0] if self.name else self.email


class Plan(models.Model):
    """What a team may have. Rows are facts that the operator edits, not code."""

    code = models.CharField(max_length=32, primary_key=True)
    name = models.CharField(max_length=100)
    max_templates = models.PositiveIntegerField()
    max_concurrent_builds = models.PositiveIntegerField()
    max_concurrent_sandboxes = models.PositiveIntegerField()
    allowed_sizes = models.JSONField(default=list)
    max_timeout_seconds = models.PositiveIntegerField()
    max_snapshots = models.PositiveIntegerField()
    max_named_snapshots = models.PositiveIntegerField()
    allow_open_network = models.BooleanField()
    custom_egress_allowlist = models.BooleanField()
    step_timeout_seconds = models.PositiveIntegerField(
        validators=[MinValueValidator(1), MaxValueValidator(LONGEST_BUILD_SECONDS)]
    )
    build_timeout_seconds = models.PositiveIntegerField(
        validators=[MinValueValidator(1), MaxValueValidator(LONGEST_BUILD_SECONDS)]
    )
    max_running_lifetime_seconds = models.PositiveIntegerField(null=True, blank=True)

    class Meta:
        constraints: ClassVar[list[models.BaseConstraint]] = [
            models.CheckConstraint(
                condition=models.Q(
                    build_timeout_seconds__range=(1, LONGEST_BUILD_SECONDS),
                    step_timeout_seconds__range=(1, LONGEST_BUILD_SECONDS),
                ),
                name="plan_build_times_within_the_queues",
            ),
        ]

    def __str__(self) -> str:
        return self.name


def new_team_id() -> str:
    """A fresh team id, as a migration can name it."""
    return new_id("team")


class Team(models.Model):
    """Who owns templates and sandboxes, and whose plan counts them."""

    id = models.CharField(max_length=40, primary_key=True, default=new_team_id, editable=False)
    name = models.CharField(max_length=100)
    slug = models.SlugField(max_length=60, unique=True)
    plan = models.ForeignKey(Plan, on_delete=models.PROTECT, related_name="teams")
    created_at = models.DateTimeField(default=timezone.now, editable=False)
    members = models.ManyToManyField(User, through="Membership", related_name="teams")

    def __str__(self) -> str:
        return self.name


class Role(models.TextChoices):
    """What a person may do in a team; each includes the ones before it."""

    MEMBER = "member", "Member"
    ADMIN = "admin", "Admin"
    OWNER = "owner", "Owner"


class Membership(models.Model):
    """A person's place in a team."""

    user = models.ForeignKey(User, on_delete=models.CASCADE, related_name="memberships")
    team = models.ForeignKey(Team, on_delete=models.CASCADE, related_name="memberships")
    role = models.CharField(max_length=16, choices=Role.choices, default=Role.MEMBER)
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


def new_token_id() -> str:
    """A fresh API token's row id, as a migration can name it."""
    return new_id("key")


class ApiToken(models.Model):
    """A secret that stands for a team. Only ``lookup`` and a keyed digest of it are stored."""

    id = models.CharField(max_length=40, primary_key=True, default=new_token_id, editable=False)
    team = models.ForeignKey(Team, on_delete=models.CASCADE, related_name="tokens")
    created_by = models.ForeignKey(
        User, on_delete=models.SET_NULL, null=True, blank=True, related_name="tokens"
    )
    name = models.CharField(max_length=100)
    lookup = models.CharField(max_length=16, unique=True, editable=False)
    digest = models.CharField(max_length=64, editable=False)
    scopes = models.JSONField(default=list)
    created_at = models.DateTimeField(default=timezone.now, editable=False)
    last_used_at = models.DateTimeField(null=True, blank=True)
    expires_at = models.DateTimeField(null=True, blank=True)
    revoked_at = models.DateTimeField(null=True, blank=True)

    class Meta:
        indexes: ClassVar[list[models.Index]] = [models.Index(fields=["team", "-created_at"])]

    def __str__(self) -> str:
        return f"{self.name} (ork_{self.lookup}_…)"

    def is_live(self) -> bool:
        """Whether it is neither revoked nor past its time."""
        expired = self.expires_at is not None and self.expires_at <= timezone.now()
        return self.revoked_at is None and not expired

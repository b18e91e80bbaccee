"""API tokens, and how fast each is used."""

from __future__ import annotations

from typing import ClassVar

from django.db import models
from django.utils import timezone

from orkestr_console.accounts.models.people import Team, User
from orkestr_console.core.ids import new_id


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
    # What it may be used for at most; null is no restriction. Templates are ids or bases' names.
    allowed_templates = models.JSONField(null=True, blank=True)
    allowed_networks = models.JSONField(null=True, blank=True)
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

    @property
    def prefix(self) -> str:
        """The part that may be shown: it names the token without being it."""
        return f"ork_{self.lookup}_…"


class RateBucket(models.Model):
    """How much of its rate a token has left: a token bucket, filled by the clock."""

    token = models.OneToOneField(
        ApiToken, on_delete=models.CASCADE, primary_key=True, related_name="bucket"
    )
    level = models.FloatField()
    at = models.DateTimeField()

    def __str__(self) -> str:
        return f"{self.token_id}: {self.level:.1f}"

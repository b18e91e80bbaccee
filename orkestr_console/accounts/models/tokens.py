"""API tokens, where they come from, and how fast each is used."""

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


class KeyedCall(models.Model):
    """A call that its client gave an ``Idempotency-Key``, and its answer once there is one.

    ``answer`` is encrypted: it may hold a secret that is shown once.
    """

    token = models.ForeignKey(
        ApiToken, on_delete=models.CASCADE, related_name="keyed_calls", db_index=False
    )
    key = models.CharField(max_length=255)
    # Of the address and the body.
    fingerprint = models.CharField(max_length=64)
    # Who makes the call now (orkestr_console.queue.driving).
    driver = models.CharField(max_length=40)
    status = models.PositiveSmallIntegerField(null=True, blank=True)
    answer = models.BinaryField(default=b"")
    created_at = models.DateTimeField(default=timezone.now, editable=False)

    class Meta:
        indexes: ClassVar[list[models.Index]] = [
            models.Index(fields=["created_at"], name="keyed_call_age")
        ]
        constraints: ClassVar[list[models.BaseConstraint]] = [
            models.UniqueConstraint(fields=["token", "key"], name="one_call_per_key")
        ]

    def __str__(self) -> str:
        return f"{self.token_id} {self.key}"


class TokenOrigin(models.Model):
    """Where a token comes from that was not made in the console. Most have no row.

    A table of its own: what admits each API call reads the tokens, and needs none of this.
    """

    token = models.OneToOneField(
        ApiToken, on_delete=models.CASCADE, primary_key=True, related_name="origin"
    )
    # The token that made it, and whose end is also its own.
    issuer = models.ForeignKey(
        ApiToken, on_delete=models.SET_NULL, null=True, blank=True, related_name="issued"
    )
    # The program that signed in with a browser, as it calls itself.
    client_name = models.CharField(max_length=100, blank=True, default="")

    def __str__(self) -> str:
        return f"{self.token_id} of {self.issuer_id or self.client_name}"


def new_device_login_id() -> str:
    """A new device login's id. A function, so that migrations can refer to it."""
    return new_id("dev")


class DeviceLogin(models.Model):
    """A program's request to be signed in by somebody with a browser (RFC 8628).

    Of both codes only keyed digests are stored. The row is deleted once it has expired.
    """

    id = models.CharField(
        max_length=40, primary_key=True, default=new_device_login_id, editable=False
    )
    device_digest = models.CharField(max_length=64, unique=True, editable=False)
    user_digest = models.CharField(max_length=64, unique=True, editable=False)
    # What the program calls itself, and where its request came from; ``source`` is what is counted
    # together, the address or the network of one.
    client_name = models.CharField(max_length=100)
    address = models.CharField(max_length=64)
    source = models.CharField(max_length=64, db_index=True)
    created_at = models.DateTimeField(default=timezone.now, editable=False)
    expires_at = models.DateTimeField(db_index=True)
    # The seconds between two polls, and the last one.
    interval = models.PositiveSmallIntegerField()
    polled_at = models.DateTimeField(null=True, blank=True)
    # Who answered, for which team, and what the token may do; no scopes are a refusal.
    answered_at = models.DateTimeField(null=True, blank=True)
    user = models.ForeignKey(User, on_delete=models.CASCADE, null=True, related_name="+")
    team = models.ForeignKey(Team, on_delete=models.CASCADE, null=True, related_name="+")
    scopes = models.JSONField(default=list)
    days = models.PositiveSmallIntegerField(null=True, blank=True)
    # When the token was handed out, which happens once.
    redeemed_at = models.DateTimeField(null=True, blank=True)

    def __str__(self) -> str:
        return f"{self.id} of {self.client_name}"


class RateBucket(models.Model):
    """How much of its rate a token has left: a token bucket, filled by the clock."""

    token = models.OneToOneField(
        ApiToken, on_delete=models.CASCADE, primary_key=True, related_name="bucket"
    )
    level = models.FloatField()
    at = models.DateTimeField()

    def __str__(self) -> str:
        return f"{self.token_id}: {self.level:.1f}"

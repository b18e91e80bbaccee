"""The single row that identifies the database's installation, and its current mark."""

from __future__ import annotations

import secrets

from django.db import models
from django.utils import timezone

from hostruntime.wire.reconciliation import Claim


def new_word() -> str:
    """A random string: an installation's id, or a mark."""
    return secrets.token_hex(16)


class Installation(models.Model):
    """This database's side of :mod:`hostruntime.host.installation`.

    ``confirmed`` means that the host has stored ``mark``. ``mismatch`` is why nothing is
    reconciled, since ``mismatch_at``. ``waiting`` is how many images and snapshots without a row
    have not been quarantined yet.
    """

    # One value only: there is one row.
    only = models.BooleanField(default=True, unique=True)
    id = models.CharField(max_length=40, primary_key=True, default=new_word, editable=False)
    epoch = models.BigIntegerField(default=0)
    mark = models.CharField(max_length=40, default=new_word)
    previous = models.CharField(max_length=40, blank=True, default="")
    confirmed = models.BooleanField(default=False)
    mismatch = models.TextField(blank=True, default="")
    mismatch_at = models.DateTimeField(null=True, blank=True)
    waiting = models.PositiveIntegerField(default=0)
    created_at = models.DateTimeField(default=timezone.now, editable=False)

    def __str__(self) -> str:
        return f"installation {self.id}, mark {self.epoch}"

    def claim(self) -> Claim:
        """The claim that is sent to the host."""
        return Claim(self.id, self.epoch, self.mark, self.previous)

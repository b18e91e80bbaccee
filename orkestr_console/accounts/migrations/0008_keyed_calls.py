"""Calls with an ``Idempotency-Key``, and their answers."""

from __future__ import annotations

import django.db.models.deletion
import django.utils.timezone
from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [("accounts", "0007_webhooks")]

    operations = [
        migrations.CreateModel(
            name="KeyedCall",
            fields=[
                (
                    "id",
                    models.BigAutoField(
                        auto_created=True, primary_key=True, serialize=False, verbose_name="ID"
                    ),
                ),
                ("key", models.CharField(max_length=255)),
                ("fingerprint", models.CharField(max_length=64)),
                ("driver", models.CharField(max_length=40)),
                ("status", models.PositiveSmallIntegerField(blank=True, null=True)),
                ("answer", models.BinaryField(default=b"")),
                (
                    "created_at",
                    models.DateTimeField(default=django.utils.timezone.now, editable=False),
                ),
                (
                    "token",
                    models.ForeignKey(
                        db_index=False,
                        on_delete=django.db.models.deletion.CASCADE,
                        related_name="keyed_calls",
                        to="accounts.apitoken",
                    ),
                ),
            ],
            options={
                "indexes": [models.Index(fields=["created_at"], name="keyed_call_age")],
                "constraints": [
                    models.UniqueConstraint(fields=("token", "key"), name="one_call_per_key")
                ],
            },
        ),
    ]

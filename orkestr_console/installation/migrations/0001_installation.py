"""Which installation's database this is."""

from __future__ import annotations

import django.utils.timezone
from django.db import migrations, models

import orkestr_console.installation.models


class Migration(migrations.Migration):
    initial = True

    dependencies = []

    operations = [
        migrations.CreateModel(
            name="Installation",
            fields=[
                ("only", models.BooleanField(default=True, unique=True)),
                (
                    "id",
                    models.CharField(
                        default=orkestr_console.installation.models.new_word,
                        editable=False,
                        max_length=40,
                        primary_key=True,
                        serialize=False,
                    ),
                ),
                ("epoch", models.BigIntegerField(default=0)),
                (
                    "mark",
                    models.CharField(
                        default=orkestr_console.installation.models.new_word, max_length=40
                    ),
                ),
                ("previous", models.CharField(blank=True, default="", max_length=40)),
                ("confirmed", models.BooleanField(default=False)),
                ("mismatch", models.TextField(blank=True, default="")),
                ("mismatch_at", models.DateTimeField(blank=True, null=True)),
                ("waiting", models.PositiveIntegerField(default=0)),
                (
                    "created_at",
                    models.DateTimeField(default=django.utils.timezone.now, editable=False),
                ),
            ],
        ),
    ]

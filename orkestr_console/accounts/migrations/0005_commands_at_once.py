"""How many commands a team may run at once."""

from __future__ import annotations

from typing import Any

from django.db import migrations, models

MOST = {"free": 8, "pro": 32, "team": 64, "enterprise": 256}


def add_commands(apps: Any, schema_editor: Any) -> None:
    plan = apps.get_model("accounts", "Plan")
    for code, most in MOST.items():
        plan.objects.filter(pk=code).update(max_concurrent_commands=most)


class Migration(migrations.Migration):
    dependencies = [("accounts", "0004_append_only_and_plans")]

    operations = [
        migrations.AddField(
            "plan", "max_concurrent_commands", models.PositiveIntegerField(default=32)
        ),
        migrations.AddField(
            "agreement",
            "max_concurrent_commands",
            models.PositiveIntegerField(blank=True, null=True),
        ),
        migrations.AddField(
            "teamlimits",
            "max_concurrent_commands",
            models.PositiveIntegerField(blank=True, null=True),
        ),
        migrations.RunPython(add_commands, migrations.RunPython.noop),
    ]

"""How many webhooks a team may have."""

from __future__ import annotations

from typing import Any

from django.db import migrations, models

MOST = {"free": 3, "pro": 10, "team": 25, "enterprise": 100}


def add_webhooks(apps: Any, schema_editor: Any) -> None:
    plan = apps.get_model("accounts", "Plan")
    for code, most in MOST.items():
        plan.objects.filter(pk=code).update(max_webhooks=most)


class Migration(migrations.Migration):
    dependencies = [("accounts", "0006_metric_labels")]

    operations = [
        migrations.AddField("plan", "max_webhooks", models.PositiveIntegerField(default=10)),
        migrations.AddField(
            "agreement", "max_webhooks", models.PositiveIntegerField(blank=True, null=True)
        ),
        migrations.AddField(
            "teamlimits", "max_webhooks", models.PositiveIntegerField(blank=True, null=True)
        ),
        migrations.RunPython(add_webhooks, migrations.RunPython.noop),
    ]

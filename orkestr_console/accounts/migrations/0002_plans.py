"""The four plans, as rows for the operator to edit."""

from __future__ import annotations

from typing import Any

from django.db import migrations

HOUR = 3600
DAY = 24 * HOUR

PLANS: list[dict[str, Any]] = [
    {
        "code": "free",
        "name": "Free",
        "max_templates": 0,
        "max_concurrent_builds": 1,
        "max_concurrent_sandboxes": 2,
        "allowed_sizes": ["small"],
        "max_timeout_seconds": HOUR,
        "max_snapshots": 1,
        "max_named_snapshots": 0,
        "allow_open_network": False,
        "custom_egress_allowlist": False,
        "step_timeout_seconds": 600,
        "build_timeout_seconds": 1200,
        "max_running_lifetime_seconds": DAY,
    },
    {
        "code": "pro",
        "name": "Pro",
        "max_templates": 5,
        "max_concurrent_builds": 2,
        "max_concurrent_sandboxes": 10,
        "allowed_sizes": ["small", "medium"],
        "max_timeout_seconds": HOUR,
        "max_snapshots": 3,
        "max_named_snapshots": 5,
        "allow_open_network": True,
        "custom_egress_allowlist": True,
        "step_timeout_seconds": 1200,
        "build_timeout_seconds": 2400,
        "max_running_lifetime_seconds": None,
    },
    {
        "code": "team",
        "name": "Team",
        "max_templates": 15,
        "max_concurrent_builds": 4,
        "max_concurrent_sandboxes": 50,
        "allowed_sizes": ["small", "medium", "large"],
        "max_timeout_seconds": DAY,
        "max_snapshots": 10,
        "max_named_snapshots": 20,
        "allow_open_network": True,
        "custom_egress_allowlist": True,
        "step_timeout_seconds": 1800,
        "build_timeout_seconds": HOUR,
        "max_running_lifetime_seconds": None,
    },
    {
        "code": "enterprise",
        "name": "Enterprise",
        "max_templates": 100,
        "max_concurrent_builds": 16,
        "max_concurrent_sandboxes": 200,
        "allowed_sizes": ["small", "medium", "large"],
        "max_timeout_seconds": 7 * DAY,
        "max_snapshots": 100,
        "max_named_snapshots": 100,
        "allow_open_network": True,
        "custom_egress_allowlist": True,
        "step_timeout_seconds": HOUR,
        "build_timeout_seconds": 2 * HOUR,
        "max_running_lifetime_seconds": None,
    },
]


def add_plans(apps: Any, schema_editor: Any) -> None:
    plan = apps.get_model("accounts", "Plan")
    for row in PLANS:
        plan.objects.get_or_create(code=row["code"], defaults=row)


class Migration(migrations.Migration):
    dependencies = [("accounts", "0001_initial")]

    # Going back keeps the rows: the operator may have changed them, and 0001 drops the table.
    operations = [migrations.RunPython(add_plans, migrations.RunPython.noop)]

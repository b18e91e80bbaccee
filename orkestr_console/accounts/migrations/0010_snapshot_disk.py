from typing import Any

from django.db import migrations, models

# Ten GiB, the disk of a small sandbox, for each snapshot that the plan has.
MEGABYTES_EACH = 10_240


def add_numbers(apps: Any, schema_editor: Any) -> None:
    plans = apps.get_model("accounts", "Plan").objects
    for plan in plans.all():
        plans.filter(pk=plan.pk).update(snapshot_disk_mb=plan.max_named_snapshots * MEGABYTES_EACH)


class Migration(migrations.Migration):
    """How many megabytes all snapshots of a team may have together."""

    dependencies = [("accounts", "0009_device_logins")]

    operations = [
        migrations.AddField("plan", "snapshot_disk_mb", models.PositiveIntegerField(default=0)),
        migrations.AddField(
            "agreement", "snapshot_disk_mb", models.PositiveIntegerField(blank=True, null=True)
        ),
        migrations.AddField(
            "teamlimits", "snapshot_disk_mb", models.PositiveIntegerField(blank=True, null=True)
        ),
        migrations.RunPython(add_numbers, migrations.RunPython.noop),
    ]

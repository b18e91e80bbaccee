from typing import Any

from django.db import migrations, models

# Ten GiB, the size of a volume by default, for each that the plan has.
MEGABYTES_EACH = 10_240


def add_numbers(apps: Any, schema_editor: Any) -> None:
    plans = apps.get_model("accounts", "Plan").objects
    for plan in plans.all():
        plans.filter(pk=plan.pk).update(volume_disk_mb=plan.max_volumes * MEGABYTES_EACH)


class Migration(migrations.Migration):
    """How many megabytes all volumes of a team may have together."""

    dependencies = [("accounts", "0010_snapshot_disk")]

    operations = [
        migrations.AddField("plan", "volume_disk_mb", models.PositiveIntegerField(default=0)),
        migrations.AddField(
            "agreement", "volume_disk_mb", models.PositiveIntegerField(blank=True, null=True)
        ),
        migrations.AddField(
            "teamlimits", "volume_disk_mb", models.PositiveIntegerField(blank=True, null=True)
        ),
        migrations.RunPython(add_numbers, migrations.RunPython.noop),
    ]

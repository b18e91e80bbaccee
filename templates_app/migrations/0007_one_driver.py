from typing import Any

from django.db import migrations, models


def drop_long_tasks(apps: Any, schema_editor: Any) -> None:
    """Tasks of builds had a queue of their own; those builds are found by their rows."""
    apps.get_model("django_q", "OrmQ").objects.filter(key__endswith=":long").delete()


class Migration(migrations.Migration):
    dependencies = [
        ("django_q", "0018_task_success_index"),
        ("templates_app", "0006_reuse_label"),
    ]

    operations = [
        migrations.RemoveIndex(model_name="template", name="template_building"),
        migrations.RemoveField(model_name="template", name="heartbeat_at"),
        migrations.AddIndex(
            model_name="template",
            index=models.Index(
                condition=models.Q(("status", "building")),
                fields=["created_at"],
                name="template_building",
            ),
        ),
        migrations.RunPython(drop_long_tasks, migrations.RunPython.noop),
    ]

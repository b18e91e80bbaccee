from django.db import migrations, models


class Migration(migrations.Migration):
    """A label alone; no statement."""

    dependencies = [("templates_app", "0005_env_and_warnings")]

    operations = [
        migrations.AlterField(
            model_name="template",
            name="reuse",
            field=models.CharField(
                blank=True,
                choices=[("failed", "Completed steps of failed builds")],
                default="",
                max_length=16,
            ),
        ),
    ]

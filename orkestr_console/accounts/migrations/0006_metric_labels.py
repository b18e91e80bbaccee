from django.db import migrations, models


class Migration(migrations.Migration):
    """Labels alone; no statement."""

    dependencies = [("accounts", "0005_commands_at_once")]

    operations = [
        migrations.AlterField(
            model_name="usageday",
            name="metric",
            field=models.CharField(
                choices=[
                    ("vcpu_seconds", "vCPU-seconds"),
                    ("gb_seconds", "GB-seconds"),
                    ("build_seconds", "Build seconds"),
                    ("image_bytes", "Image bytes not shared"),
                    ("shared_bytes", "Image bytes shared with bases"),
                ],
                max_length=16,
            ),
        ),
    ]

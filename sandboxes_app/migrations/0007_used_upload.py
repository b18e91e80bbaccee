from django.db import migrations, models


class Migration(migrations.Migration):
    """Which signed addresses of uploads have been used: each is good for one."""

    dependencies = [("sandboxes_app", "0006_sandbox_driven")]

    operations = [
        migrations.CreateModel(
            name="UsedUpload",
            fields=[
                (
                    "id",
                    models.CharField(
                        editable=False, max_length=32, primary_key=True, serialize=False
                    ),
                ),
                ("expires_at", models.DateTimeField(db_index=True)),
            ],
        ),
    ]

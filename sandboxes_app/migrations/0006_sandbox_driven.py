from django.db import migrations, models


class Migration(migrations.Migration):
    """An ended sandbox names who frees its container; those are few among all that have ended."""

    dependencies = [("sandboxes_app", "0005_driver")]

    operations = [
        migrations.AddIndex(
            model_name="sandbox",
            index=models.Index(
                condition=models.Q(("driver", ""), _negated=True),
                fields=["driver"],
                name="sandbox_driven",
            ),
        ),
    ]

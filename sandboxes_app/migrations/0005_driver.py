from django.db import migrations, models


class Migration(migrations.Migration):
    """What is on its way names its driver, in place of when that was last heard of."""

    dependencies = [("sandboxes_app", "0004_driven_at")]

    operations = [
        migrations.RemoveField(model_name="sandbox", name="driven_at"),
        migrations.RemoveField(model_name="snapshot", name="driven_at"),
        migrations.AddField(
            model_name="sandbox",
            name="driver",
            field=models.CharField(blank=True, default="", max_length=40),
        ),
        migrations.AddField(
            model_name="snapshot",
            name="driver",
            field=models.CharField(blank=True, default="", max_length=40),
        ),
        migrations.AddIndex(
            model_name="snapshot",
            index=models.Index(
                condition=models.Q(("status", "capturing")),
                fields=["driver"],
                name="snapshot_capturing",
            ),
        ),
    ]

from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [("sandboxes_app", "0003_snapshots")]

    operations = [
        migrations.AddField(
            model_name="sandbox",
            name="driven_at",
            field=models.DateTimeField(blank=True, null=True),
        ),
        migrations.AddField(
            model_name="snapshot",
            name="driven_at",
            field=models.DateTimeField(blank=True, null=True),
        ),
    ]

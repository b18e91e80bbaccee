from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [
        ("templates_app", "0003_builds"),
    ]

    operations = [
        migrations.AddField(
            model_name="buildstep",
            name="refused_hosts",
            field=models.JSONField(blank=True, default=list),
        ),
    ]

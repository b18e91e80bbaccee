from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [
        ("templates_app", "0004_step_refused_hosts"),
    ]

    operations = [
        migrations.AddField(
            model_name="buildstep",
            name="warnings",
            field=models.JSONField(blank=True, default=list),
        ),
        migrations.AddField(
            model_name="template",
            name="env",
            field=models.JSONField(blank=True, default=dict),
        ),
    ]

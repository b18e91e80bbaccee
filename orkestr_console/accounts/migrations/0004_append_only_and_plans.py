"""The audit log takes additions only, and the plans get their new numbers."""

from __future__ import annotations

from typing import Any

from django.db import migrations

# A test's clean-up says so on its connection (settings of tests); nobody else may.
PROTECT = """
CREATE FUNCTION accounts_audit_append_only() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF TG_OP = 'TRUNCATE' AND current_setting('orkestr.truncates_audit', true) = 'on' THEN
        RETURN NULL;
    END IF;
    RAISE EXCEPTION 'the audit log is append-only' USING ERRCODE = 'insufficient_privilege';
END $$;
CREATE TRIGGER audit_append_only BEFORE UPDATE OR DELETE ON accounts_auditentry
    FOR EACH ROW EXECUTE FUNCTION accounts_audit_append_only();
CREATE TRIGGER audit_not_truncated BEFORE TRUNCATE ON accounts_auditentry
    FOR EACH STATEMENT EXECUTE FUNCTION accounts_audit_append_only();
"""
UNPROTECT = """
DROP TRIGGER audit_append_only ON accounts_auditentry;
DROP TRIGGER audit_not_truncated ON accounts_auditentry;
DROP FUNCTION accounts_audit_append_only();
"""
# code: (volumes, megabytes of template images, API requests a minute)
NUMBERS = {
    "free": (0, 0, 120),
    "pro": (5, 20_000, 600),
    "team": (20, 100_000, 1200),
    "enterprise": (200, 1_000_000, 6000),
}


def add_numbers(apps: Any, schema_editor: Any) -> None:
    plan = apps.get_model("accounts", "Plan")
    for code, (volumes, disk, rate) in NUMBERS.items():
        plan.objects.filter(pk=code).update(
            max_volumes=volumes, template_disk_mb=disk, api_requests_per_minute=rate
        )


class Migration(migrations.Migration):
    dependencies = [("accounts", "0003_teams_limits_audit")]

    operations = [
        migrations.RunSQL(PROTECT, UNPROTECT),
        # Taken from at every call and worth nothing after a crash: it need not reach the disk.
        migrations.RunSQL(
            "ALTER TABLE accounts_ratebucket SET UNLOGGED",
            "ALTER TABLE accounts_ratebucket SET LOGGED",
        ),
        migrations.RunPython(add_numbers, migrations.RunPython.noop),
    ]

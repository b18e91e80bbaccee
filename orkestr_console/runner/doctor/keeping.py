"""The state directory's own records: its installation, and its quarantine."""

from __future__ import annotations

from hostruntime.host.installation import read_installation_record
from hostruntime.host.paths import StatePaths
from hostruntime.image.quarantine import Quarantine, retention_days
from hostruntime.image.trash import Trash
from orkestr_console.runner.doctor.finding import Finding
from orkestr_console.runner.layout import Layout

MAX_LISTED = 5


def check_installation(layout: Layout) -> Finding:
    """Whether the database matched this state directory at the last comparison."""
    paths, name = StatePaths(layout.state_dir), "installation"
    found = read_installation_record(paths.installation_file)
    if found.mismatch:
        remedy = (
            "put the right one beside the other, or say ./manage.py installation accept; until "
            "then nothing is reconciled"
        )
        return Finding(name, "fail", found.mismatch, remedy)
    if not found.id:
        return Finding(name, "ok", "no database has claimed the state directory yet")
    return Finding(name, "ok", f"the state directory is of installation {found.id[:8]}")


def check_quarantine(layout: Layout) -> Finding:
    """Quarantined items, which somebody may miss."""
    paths, name = StatePaths(layout.state_dir), "quarantine"
    if not paths.quarantine.is_dir():
        return Finding(name, "ok", "nothing was set aside")
    items = Quarantine(paths, Trash(paths)).list()
    if not items:
        return Finding(name, "ok", "nothing was set aside")
    shown = ", ".join(f"{one.key} ({one.reason})" for one in items[:MAX_LISTED])
    more = f" and {len(items) - MAX_LISTED} more" if len(items) > MAX_LISTED else ""
    remedy = (
        "./manage.py quarantine list, restore or delete; each is deleted for good "
        f"{retention_days():g} days after it was set aside"
    )
    return Finding(name, "warn", f"{len(items)} set aside: {shown}{more}", remedy)

"""What the state directory says of itself: whose it is, and what was set aside in it."""

from __future__ import annotations

from hostruntime.host.installation import read_installation_record
from hostruntime.host.paths import StatePaths
from hostruntime.image.quarantine import Quarantine, keep_days
from hostruntime.image.trash import Trash
from orkestr_console.runner.doctor.finding import Finding
from orkestr_console.runner.layout import Layout

NAMED = 5


def check_installation(layout: Layout) -> Finding:
    """Whether the database was found to be this state directory's, when it was last compared."""
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
    """What was set aside, which somebody may miss."""
    paths, name = StatePaths(layout.state_dir), "quarantine"
    if not paths.quarantine.is_dir():
        return Finding(name, "ok", "nothing was set aside")
    held = Quarantine(paths, Trash(paths)).list()
    if not held:
        return Finding(name, "ok", "nothing was set aside")
    shown = ", ".join(f"{one.key} ({one.reason})" for one in held[:NAMED])
    more = f" and {len(held) - NAMED} more" if len(held) > NAMED else ""
    remedy = (
        "./manage.py quarantine list, restore or delete; each is deleted for good "
        f"{keep_days():g} days after it was set aside"
    )
    return Finding(name, "warn", f"{len(held)} set aside: {shown}{more}", remedy)

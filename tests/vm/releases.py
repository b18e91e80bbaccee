"""The releases that the product is tried on.

Ubuntu 24.04 is not among them: its packages come from archives of its own, signed with keys of its
own, and a Debian machine's apt is configured with neither.  Where a machine's apt knows both, a
line here is all that is missing.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Release:
    """One distribution's release: its apt codename, and what people call it.

    ``own_python`` says whether it has a Python the product runs on; where it has none, this
    machine's is copied in (on people's machines uv fetches one, from hosts not reached here).
    """

    codename: str
    title: str
    own_python: bool


RELEASES = {
    release.codename: release
    for release in (
        Release("trixie", "Debian 13", own_python=True),
        Release("bookworm", "Debian 12", own_python=False),
    )
}

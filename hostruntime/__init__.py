"""The host runtime: LXC containers, images and builds on one machine.

Nothing in this package knows of teams, plans or Django.  One process, the *host agent*
(:mod:`hostruntime.agent`), runs as root and owns every mount, cgroup, namespace and container of
one *state directory* (:mod:`hostruntime.host.paths`); everything else talks to it through
:mod:`hostruntime.client.host_client`.
"""

from __future__ import annotations

import pathlib
import sys
from types import ModuleType

__version__ = "0.1.0"

if sys.version_info < (3, 13):
    # pathlib interns each part of each path, and Python 3.12 never frees interned strings (they are
    # immortal; mortal again in 3.13): 120 bytes for each name, of which a sandbox has forty and a
    # command two.  Importing this package turns that interning off.
    _sys = ModuleType("sys")
    vars(_sys).update(vars(sys), intern=str)
    vars(pathlib)["sys"] = _sys

"""The host runtime: LXC containers, images and builds on one machine.

Nothing in this package knows of teams, plans or Django.  One process, the *host agent*
(:mod:`hostruntime.agent`), runs as root and owns every mount, cgroup, namespace and container of
one *state directory* (:mod:`hostruntime.host.paths`); everybody else talks to it through
:mod:`hostruntime.client.host_client`.
"""

from __future__ import annotations

import pathlib
import sys
from types import ModuleType

__version__ = "0.1.0"

if sys.version_info < (3, 13):
    # pathlib interns each part of each path, and what is interned Python 3.12 keeps for ever (it is
    # immortal; mortal again in 3.13): 120 bytes for each name, of which a sandbox has forty and a
    # command two.  Whoever imports this package has paths that are forgotten with their last user.
    _sys = ModuleType("sys")
    vars(_sys).update(vars(sys), intern=str)
    vars(pathlib)["sys"] = _sys

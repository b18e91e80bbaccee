"""The host runtime: LXC containers, images and builds on one machine.

Nothing in this package knows of teams, plans or Django.  One process, the *host agent*
(:mod:`hostruntime.agent`), runs as root and owns every mount, cgroup, namespace and container of
one *state directory* (:mod:`hostruntime.host.paths`); everybody else talks to it through
:mod:`hostruntime.client.host_client`.
"""

from __future__ import annotations

__version__ = "0.1.0"

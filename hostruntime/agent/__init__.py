"""The host agent: the one process that runs as root and owns a state directory.

``python -m hostruntime.agent --state-dir DIR --socket PATH`` serves HTTP on a Unix socket until
SIGTERM; containers stay.  ``… teardown`` stops every container of the installation and removes
all it has on the host; images stay.
"""

from __future__ import annotations

"""Whether this database and the host's state directory belong together.

See :mod:`hostruntime.host.installation` for what is compared, and why.
"""

from __future__ import annotations

"""Whether anything is left on a host of many commands and sandboxes.

Counts what the agent and its launchers hold after few and after many (:mod:`tests.host.counts`) and
prints both; ends with status 1 if there is more of anything.  Run it as root:
``python -m tests.benchmarks.leaks``.
"""

from __future__ import annotations

import argparse
import sys
import time

from tests.host.agent import an_agent
from tests.host.counts import COMMANDS_A_SANDBOX, grown, settled, work

BASE = "debian-12"
FEW, AT_ONCE = 18, 6


def main() -> int:
    """Count, work, count again."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--creates", type=int, default=400)
    options = parser.parse_args()
    with an_agent() as agent:
        for _ in agent.client.ensure_base(BASE):
            pass
        work(agent.client, BASE, FEW, AT_ONCE)
        before, began = settled(agent), time.monotonic()
        work(agent.client, BASE, options.creates)
        seconds, after = time.monotonic() - began, settled(agent)
    commands = options.creates * COMMANDS_A_SANDBOX
    sys.stdout.write(f"{options.creates} sandboxes, {commands} commands in {seconds:.0f} s\n")
    for kind in sorted(before | after):
        sys.stdout.write(f"{kind:<28}{before[kind]:>8}{after[kind]:>8}\n")
    more = grown(before, after)
    sys.stdout.write(f"more than before: {', '.join(more) or 'nothing'}\n")
    return 1 if more else 0


if __name__ == "__main__":
    sys.exit(main())

"""Which processes are taken for the proxy's: what they call themselves is a tenant's to choose."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hostruntime.host.paths import Instance, StatePaths
from hostruntime.network.egress import EgressProxy
from hostruntime.network.policy import deny_list
from hostruntime.network.settings import NetworkSettings
from hostruntime.network.slots import SlotPool

# Becomes the first process of a namespace, or stays in this one; says its pid and lives on.
_NAMED = """
import os, sys, time
if os.environ["WHERE"] == "apart":
    os.unshare(os.CLONE_NEWPID)
words = [sys.executable, "-c", "import time; time.sleep(600)", os.environ["NAME"]]
print(os.posix_spawn(sys.executable, words, os.environ), flush=True)
os.wait()
"""


@contextmanager
def named(name: Path, where: str) -> Iterator[int]:
    argv, env = [sys.executable, "-c", _NAMED], {**os.environ, "NAME": str(name), "WHERE": where}
    with subprocess.Popen(argv, env=env, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        try:
            yield pid
        finally:
            child = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
            os.kill(int(child), 9)


def test_a_process_of_a_container_is_not_taken_for_the_proxys(tmp_path: Path) -> None:
    """It would be waited for, as one that is at work, while the proxy itself hangs."""
    paths = StatePaths(tmp_path / "state").ensure()
    pool = SlotPool(paths, Instance(3), NetworkSettings(deny_list(), (), ("192.0.2.53",)))
    proxy = EgressProxy(paths, Instance(3), pool)
    for name, found in (("squid.conf", proxy.processes), ("helper.pyz", proxy.helpers)):
        with named(proxy.run_dir.egress / name, "here") as pid:
            assert pid in found()
        with named(proxy.run_dir.egress / name, "apart") as pid:
            assert pid not in found()

"""What a neighbour notices of a tenant that takes all it can get.

For each hog of :mod:`tests.host.hogs`: how long a command in another sandbox takes before it and
while it has been at it for twenty seconds, in one run, and the machine's load some seconds later.
Run it as root: ``python -m tests.benchmarks.hogs``.
"""

from __future__ import annotations

import argparse
import os
import sys
import threading
import time
from contextlib import suppress

from hostruntime.errors import HostError
from hostruntime.wire.commands import Exec
from hostruntime.wire.sandboxes import CreateSandbox
from tests.benchmarks.report import Row, milliseconds, print_table
from tests.host.agent import an_agent
from tests.host.client import HostClient
from tests.host.hogs import HOGS

BASE = "debian-12"
CALM = 100
SETTLING_SECONDS = 5


def measure(host: HostClient, hog: str, seconds: float) -> list[Row]:
    """Times of a neighbour's commands, before and during."""
    host.create_sandbox(CreateSandbox("sbx_hog", image=BASE, cpu=1, memory_mb=512, disk_mb=1024))
    host.create_sandbox(CreateSandbox("sbx_neighbour", image=BASE, cpu=1, memory_mb=512))
    try:

        def command() -> float:
            return milliseconds(lambda: host.exec("sbx_neighbour", Exec("echo fine")))

        before = [command() for _ in range(CALM)]
        work = threading.Thread(target=run_hog, args=(host, hog, seconds))
        work.start()
        during: list[float] = []
        while work.is_alive():
            during.append(command())
        return [Row("before", before), Row(hog, during)]
    finally:
        for name in ("sbx_hog", "sbx_neighbour"):
            host.delete_sandbox(name)


def run_hog(host: HostClient, hog: str, seconds: float) -> None:
    """The hog until its time is over."""
    with suppress(HostError):
        host.exec("sbx_hog", Exec(HOGS[hog], timeout_seconds=seconds, max_output_bytes=1 << 20))


def main() -> None:
    """Measure every hog in turn."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=20.0)
    options = parser.parse_args()
    with an_agent() as agent:
        for _ in agent.client.ensure_base(BASE):
            pass
        for hog in HOGS:
            print_table(f"A command beside: {hog}", measure(agent.client, hog, options.seconds))
            time.sleep(SETTLING_SECONDS)
            sys.stdout.write(f"load {SETTLING_SECONDS} s later: {os.getloadavg()[0]:.1f}\n")


if __name__ == "__main__":
    main()

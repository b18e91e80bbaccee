"""What the egress proxy costs: a connection, and throughput, beside the same without it.

Both go from a slot to the same TLS server in a world of network namespaces: one on the open
network, straight out, the other on the restricted one, through the proxy, which looks at the
ClientHello and splices. Run it as root: ``python -m tests.benchmarks.egress``.
"""

from __future__ import annotations

import argparse
import socket
import ssl
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from hostruntime.host.paths import StatePaths, claim_instance, release_instance
from hostruntime.network import registries
from hostruntime.network.egress import EgressProxy
from hostruntime.network.policy import Policy
from hostruntime.network.slots import Slot, SlotPool
from tests.benchmarks.report import Row, print_table
from tests.host.network import SETTINGS, from_slot
from tests.host.topology import GREETING, INTERNET, a_world

NAME = "allowed.test"
MEBIBYTE = 1024**2
AMOUNT = 128 * MEBIBYTE

type Open = Callable[[], socket.socket]


@dataclass(frozen=True)
class Route:
    """One way out: from which slot, and how a connection to the server is made there."""

    name: str
    slot: Slot
    connect: Open

    def greeting_ms(self) -> float:
        """From nothing to the first decrypted bytes, in milliseconds."""

        def measure() -> float:
            began = time.perf_counter()
            with greeted(self.connect()):
                return (time.perf_counter() - began) * 1000

        return from_slot(self.slot, measure)

    def transfer_ms(self) -> float:
        """Milliseconds for ``AMOUNT`` bytes on a connection that is up."""

        def measure() -> float:
            with greeted(self.connect()) as tunnel:
                began = time.perf_counter()
                tunnel.sendall(str(AMOUNT).encode())
                left = AMOUNT
                while left > 0:
                    data = tunnel.recv(MEBIBYTE)
                    assert data, "the server ended too early"
                    left -= len(data)
                return (time.perf_counter() - began) * 1000

        return from_slot(self.slot, measure)


def client_context() -> ssl.SSLContext:
    """One for all: making it takes longer than a connection. The server signs for itself."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


CONTEXT = client_context()


def greeted(connection: socket.socket) -> ssl.SSLSocket:
    """TLS over it, after the server's greeting."""
    tunnel = CONTEXT.wrap_socket(connection, server_hostname=NAME)
    assert tunnel.recv(100) == GREETING
    return tunnel


def straight() -> socket.socket:
    """A plain connection to the server."""
    return socket.create_connection((INTERNET, 443), 10)


def proxied(address: tuple[str, int]) -> Open:
    """A tunnel through the proxy."""

    def connect() -> socket.socket:
        connection = socket.create_connection(address, 10)
        connection.sendall(f"CONNECT {NAME}:443 HTTP/1.1\r\n\r\n".encode())
        answer = connection.recv(4000)
        assert b" 200 " in answer, answer
        return connection

    return connect


@contextmanager
def routes() -> Iterator[list[Route]]:
    """Both ways out of a world made for the run, which is gone at the end."""
    with tempfile.TemporaryDirectory(prefix="orkestr-bench-") as scratch:
        paths = StatePaths(Path(scratch) / "state").ensure()
        with a_world(Path(scratch)) as world:
            world.names[NAME] = [INTERNET]
            pool = SlotPool(paths, claim_instance(paths), SETTINGS)
            pool.setup()
            proxy = EgressProxy(paths, pool.instance, pool)
            try:
                proxy.start()
                free = pool.acquire("straight", Policy("open"))
                bound = pool.acquire("proxied", Policy("restricted", (NAME,)))
                yield [
                    Route("open network, no proxy", free, straight),
                    Route("restricted network, proxy", bound, proxied(pool.proxy_address())),
                ]
            finally:
                proxy.stop()
                registries.clear_cache()
                pool.teardown()
                release_instance(paths)


def turns(found: Sequence[Route], measure: Callable[[Route], float], rounds: int) -> list[Row]:
    """Measurements of each, taking turns."""
    times: dict[str, list[float]] = {route.name: [] for route in found}
    for _ in range(rounds):
        for route in found:
            times[route.name].append(measure(route))
    return [Row(name, values) for name, values in times.items()]


def main(argv: Sequence[str]) -> int:
    """Measure both, print two tables."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.egress")
    parser.add_argument("--rounds", type=int, default=100, help="connections each (default 100)")
    options = parser.parse_args(argv)
    with routes() as found:
        # The proxy's second stage is up a moment after its first.
        time.sleep(3)
        turns(found, Route.greeting_ms, 5)
        print_table("Connect, TLS, first bytes", turns(found, Route.greeting_ms, options.rounds))
        amount = f"{AMOUNT // MEBIBYTE} MiB on one connection"
        print_table(amount, turns(found, Route.transfer_ms, max(options.rounds // 10, 3)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

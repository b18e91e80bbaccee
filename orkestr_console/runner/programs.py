"""The programs of an installation: how to start each, and how to check that it is ready."""

from __future__ import annotations

import sys
from pathlib import Path

import httpx

from hostruntime.client.host_client import HostClient
from hostruntime.errors import HostError
from hostruntime.host.patience import scaled
from orkestr_console.runner.account import USER, Identity
from orkestr_console.runner.keeper import Program
from orkestr_console.runner.layout import Layout

# How long a starting program may be idle before it counts as failed; the time it works doesn't
# count. The agent's first start creates its pool of network namespaces and reclaims what a killed
# one left.
AGENT_SECONDS = 120
DATABASE_SECONDS = 60
WEB_SECONDS = 120
WORKER_SECONDS = 120
# A slower request is retried: meanwhile nobody notices whether the program has crashed.
ANSWER_SECONDS = 10


def postgres(layout: Layout) -> Program:
    """The private database server. Raises ``PostgresError``."""
    # Stopped last; SIGINT is its fast shutdown, which does not wait for clients.
    return Program("postgres", layout.cluster.command(), 1, stop_signal="INT", stop_seconds=30)


def agent(layout: Layout) -> Program:
    """The host agent, the only one that stays root."""
    module = [sys.executable, "-m", "hostruntime.agent"]
    options = ["--state-dir", str(layout.state_dir), "--socket", str(layout.host_socket)]
    dying_with_us = ["setpriv", "--pdeathsig=TERM", "--"]
    return Program("agent", [*dying_with_us, *module, *options, "--socket-group", USER], 10)


def worker(layout: Layout, identity: Identity) -> Program:
    """The queue's worker. Its entire group is stopped: its children must not outlive it."""
    command = [*identity.prefix, *manage(layout, "worker")]
    return Program("worker", command, 20, stop_group=True)


def web(layout: Layout, identity: Identity) -> Program:
    """The console, REST and WebSockets."""
    return Program("web", [*identity.prefix, *manage(layout, "serve", f"--port={layout.port}")], 30)


def previews(layout: Layout, identity: Identity) -> Program:
    """The front, which carries visitors to ports in sandboxes."""
    command = manage(layout, "previews", f"--port={layout.preview_port}")
    return Program("previews", [*identity.prefix, *command], 30)


def manage(layout: Layout, *arguments: str) -> list[str]:
    """The command line of a management command."""
    return [sys.executable, str(layout.tree / "manage.py"), *arguments]


def web_is_ready(layout: Layout) -> bool:
    """Whether the web process serves requests and reaches the database."""
    return check_ok(layout, "database")


def previews_are_ready(layout: Layout) -> bool:
    """Whether the front answers."""
    address = f"{layout.local_address(layout.preview_port or 0)}/healthz"
    try:
        answer = httpx.get(address, timeout=scaled(ANSWER_SECONDS), trust_env=False)
    except httpx.HTTPError:
        return False
    return answer.is_success


def worker_is_ready(layout: Layout) -> bool:
    """Whether the worker is running, as the web process sees it."""
    return check_ok(layout, "worker")


def check_ok(layout: Layout, check: str) -> bool:
    """Whether ``/readyz`` reports one check as ok; False if it doesn't answer."""
    address = f"{layout.local_url}/readyz"
    try:
        answer = httpx.get(address, timeout=scaled(ANSWER_SECONDS), trust_env=False)
        return bool(answer.json()["checks"][check]["state"] == "ok")
    except (httpx.HTTPError, ValueError, KeyError):
        return False


def agent_is_ready(socket: Path) -> bool:
    """Whether the host agent serves requests on ``socket``."""
    try:
        with HostClient(socket) as host:
            host.health(seconds=ANSWER_SECONDS)
    except HostError:
        return False
    return True

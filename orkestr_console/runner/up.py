"""`manage.py up`: start everything, report it, and keep it running until Ctrl-C."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from hostruntime.client.host_client import HostClient
from hostruntime.errors import HostError
from hostruntime.wire.images import BaseInfo
from orkestr_console.core.preview_base import PreviewBase
from orkestr_console.runner import programs
from orkestr_console.runner.account import Identity, change_owner, choose_identity, ensure_user
from orkestr_console.runner.display import Display
from orkestr_console.runner.doctor import listen_problem
from orkestr_console.runner.guard import Guard
from orkestr_console.runner.keeper import Keeper, Program
from orkestr_console.runner.layout import Layout, StartError
from orkestr_console.runner.lock import exclusive_lock
from orkestr_console.runner.selfcheck import SelfCheck, SelfCheckError
from orkestr_console.runner.summary import (
    Credentials,
    known_credentials,
    summary,
    write_console_json,
)

MEBIBYTE = 1024**2
OOM_SCORE_ADJ = -900
# Django's secrets in var/run, which the unprivileged processes must be able to read.
SECRETS = ("secret_key", "token_pepper")


class Console:
    """One run of the installation, from nothing to serving and back."""

    def __init__(self, layout: Layout, display: Display, *, self_check: bool) -> None:
        self._layout = layout
        self._display = display
        self._self_check = self_check
        self._started_at = time.monotonic()
        self._stopping = False

    def run(self) -> None:
        """Serve until SIGINT or SIGTERM.

        Raises ``StartError`` or ``PostgresError`` if something doesn't start; what had started is
        stopped again.
        """
        self._require_root()
        # Files created without an explicit mode must not depend on who starts it.
        os.umask(0o022)
        protect_from_oom_killer()
        self._layout.prepare()
        with exclusive_lock(self._layout):
            # A killed run leaves it.
            self._layout.ready.unlink(missing_ok=True)
            self._require_complete_restore()
            self._require_port()
            ensure_user()
            if self._layout.database_url is None:
                self._layout.cluster.create()
            identity = self._choose_identity()
            self._keeper = Keeper(self._layout, self._programs(identity))
            self._serve(identity)

    def _require_root(self) -> None:
        if os.geteuid() != 0:
            raise StartError(
                "containers, mounts and networks need root: start with `make run`, or with sudo"
            )

    def _require_complete_restore(self) -> None:
        if self._layout.restore_marker.exists():
            raise StartError(
                "a restore into this installation was not finished: repeat `./manage.py restore "
                "DIRECTORY`, or give it up with `make clean`"
            )

    def _require_port(self) -> None:
        layout = self._layout
        if (fault := listen_problem(layout.port, layout.listen)) is not None:
            raise StartError(f"port {': '.join(fault)}")
        if (previews := layout.preview_port) is not None and (
            fault := listen_problem(previews, layout.listen)
        ) is not None:
            raise StartError(
                f"port {fault[0]}, and previews are served there: set ORKESTR_PREVIEW_PORT to "
                "another port, or to `off`"
            )
        if layout.public_url_unreachable:
            self._display.warn(
                f"ORKESTR_PUBLIC_URL is {layout.url}, but the console listens on this machine "
                "alone: set ORKESTR_LISTEN to an address that others reach, or to `all`"
            )

    def _choose_identity(self) -> Identity:
        identity = choose_identity(self._layout.tree, self._layout.run)
        if identity.warning:
            self._display.warn(identity.warning)
        return identity

    def _programs(self, identity: Identity) -> list[Program]:
        layout = self._layout
        selected = [
            programs.agent(layout),
            programs.worker(layout, identity),
            programs.web(layout, identity),
        ]
        if layout.preview_port is not None:
            selected.append(programs.previews(layout, identity))
        return selected if layout.database_url else [programs.postgres(layout), *selected]

    def _serve(self, identity: Identity) -> None:
        pool = ThreadPoolExecutor(max_workers=1)
        try:
            self._start(pool, identity)
            Guard(self._layout, self._keeper, self._display).run()
        except KeyboardInterrupt:
            self._display.line("\n  Stopping. Sandboxes keep running; `make down` ends them.")
        finally:
            # A second Ctrl-C must not leave anything running.
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            self._stopping = True
            self._layout.ready.unlink(missing_ok=True)
            self._keeper.stop()
            pool.shutdown(cancel_futures=True)

    def _start(self, pool: ThreadPoolExecutor, identity: Identity) -> None:
        self._keeper.start()
        host = pool.submit(self._start_host)
        self._start_database()
        credentials = self._prepare(identity)
        self._start_console()
        seconds = time.monotonic() - self._started_at
        host.result()
        if self._self_check:
            self._check(credentials)
        self._display.line(summary(self._layout, credentials, seconds))
        self._layout.ready.write_text(f"{self._layout.url}\n")

    def _start_database(self) -> None:
        if self._layout.database_url is not None:
            return
        cluster = self._layout.cluster
        with self._display.step("database") as step:
            self._keeper.launch("postgres")
            self._await("database", "postgres", cluster.is_ready, programs.DATABASE_SECONDS)
            cluster.ensure_database()
            step.detail = f"private PostgreSQL in {cluster.data}"

    def _prepare(self, identity: Identity) -> Credentials:
        """Migrate the schema and ensure that the demo team exists."""
        command = ["prepare", f"--credentials={self._layout.console_json}"]
        if self._layout.sandboxes_ended_marker.exists():
            command.append("--sandboxes-ended")
        with self._display.step("schema") as step:
            prepared = subprocess.run(
                programs.manage(self._layout, *command),
                env={**os.environ, **self._layout.environment()},
                capture_output=True,
                text=True,
                stdin=subprocess.DEVNULL,
                # Ctrl-C must not interrupt it: the shutdown that follows waits for it.
                start_new_session=True,
            )
            credentials = known_credentials(self._layout)
            if prepared.returncode != 0 or credentials is None:
                raise StartError(f"the database could not be prepared:\n{prepared.stderr.strip()}")
            self._layout.sandboxes_ended_marker.unlink(missing_ok=True)
            migrated = json.loads(prepared.stdout)["migrated"]
            step.detail = f"{migrated} migrations applied" if migrated else "up to date"
        self._layout.audit_spool.mkdir(mode=0o700, exist_ok=True)
        change_owner(self._layout.audit_spool, identity.user)
        for secret in (self._layout.run / name for name in SECRETS):
            if secret.exists():
                change_owner(secret, identity.user)
        write_console_json(self._layout, credentials)
        return credentials

    def _start_console(self) -> None:
        web_ready = partial(programs.web_is_ready, self._layout)
        with self._display.step("web, worker") as step:
            for name in ("web", "worker"):
                self._keeper.launch(name)
            self._await("web, worker", "web", web_ready, programs.WEB_SECONDS)
            worker_ready = partial(programs.worker_is_ready, self._layout)
            self._await("web, worker", "worker", worker_ready, programs.WORKER_SECONDS)
            step.detail = f"answering at {self._layout.url}/"
        if self._layout.preview_base is not None:
            self._start_previews(self._layout.preview_base)

    def _start_previews(self, base: PreviewBase) -> None:
        ready = partial(programs.previews_are_ready, self._layout)
        with self._display.step("previews") as step:
            self._keeper.launch("previews")
            self._await("previews", "previews", ready, programs.WEB_SECONDS)
            step.detail = f"answering at {base.scheme}://<port>-<sandbox>.{base.authority}/"

    def _await(self, label: str, program: str, ready: Callable[[], bool], seconds: float) -> None:
        say = partial(self._display.progress, label)
        self._keeper.await_ready(program, ready, seconds, say)

    def _start_host(self) -> None:
        """Start the agent, then create missing base images; runs in its own thread."""
        socket = self._layout.host_socket
        with self._display.step("host agent") as step:
            self._keeper.launch("agent")
            agent_ready = partial(programs.agent_is_ready, socket)
            self._await("host agent", "agent", agent_ready, programs.AGENT_SECONDS)
            with HostClient(socket) as host:
                health = host.health()
            step.detail = f"instance {health.instance}, cgroups {health.cgroup}"
        if not health.proxy.get("healthy"):
            self._display.warn(
                "the egress proxy does not run: networks of mode restricted reach nothing, and "
                "bases cannot be made; `make doctor` and agent.log say more"
            )
        with HostClient(socket) as host:
            bases = host.bases()
            for base in bases:
                # Those on request are made when somebody wants them, which the agent remembers.
                if base.state != "ready" and not base.on_request and not self._stopping:
                    self._create_base(host, base)
            for note in host.health().notes:
                self._display.warn(note)
        self._report_bases(bases)

    def _create_base(self, host: HostClient, base: BaseInfo) -> None:
        label = f"base {base.name}"
        try:
            with self._display.step(label) as step:
                for event in host.ensure_base(base.name):
                    if event.message:
                        self._display.progress(label, event.message)
                    elif event.image:
                        step.detail = f"{event.image.size_bytes / MEBIBYTE:.0f} MiB"
        except HostError as error:
            # A base that cannot be created (say, no mirror has its packages) doesn't affect others.
            if not self._stopping:
                self._display.warn(
                    f"{label} could not be created. It is retried automatically, and not offered "
                    f"until then: {error}"
                )

    def _report_bases(self, bases: list[BaseInfo]) -> None:
        """Say which were there, and which are made on request."""
        ready = [base.name for base in bases if base.state == "ready"]
        later = [base.name for base in bases if base.state != "ready" and base.on_request]
        if ready or later:
            with self._display.step("base images") as step:
                on_request = f"on request: {', '.join(later)}" if later else ""
                step.detail = "; ".join(filter(None, [", ".join(ready), on_request]))

    def _check(self, credentials: Credentials) -> None:
        check = SelfCheck(
            self._layout.local_url,
            credentials.api_key,
            partial(self._display.progress, "self-check"),
            self._keeper.pids,
        )
        try:
            with self._display.step("self-check") as step:
                check.run()
                step.detail = "a recipe became an image, and a sandbox ran"
            self._display.times(check.times)
        except SelfCheckError as error:
            self._display.warn(f"the self-check failed: {error}")
            self._display.warn(f"the console serves all the same; see {self._layout.log}")


def protect_from_oom_killer() -> None:
    """Make this process and its children the kernel's last choice when memory runs out (proc(5)).

    Sandboxes are excluded by their launcher (hostruntime.container.lxc).
    """
    with contextlib.suppress(OSError):
        # Not permitted to the root of some containers.
        Path("/proc/self/oom_score_adj").write_text(f"{OOM_SCORE_ADJ}\n")

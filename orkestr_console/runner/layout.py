"""The paths of an installation's state and sockets, and the environment that sets them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from hostruntime.host.patience import configured_slowness, slowness
from orkestr_console.core.listening import listen_addresses, trusted_proxies
from orkestr_console.core.machine import web_processes
from orkestr_console.core.networks import listed_networks
from orkestr_console.runner.postgres import Cluster

TREE = Path(__file__).resolve().parents[2]
# sun_path of unix(7), less its NUL.
MAX_SOCKET_PATH = 107
# PID_MAX_LIMIT of a 64-bit kernel (proc(5), pid_max).
MAX_PID = 2**22
FORBIDDEN_CHARACTERS = frozenset("%;#\"'\n")


class StartError(Exception):
    """The console cannot start; the message says what was wrong and what to do."""


@dataclass(frozen=True)
class Layout:
    """The paths and the port of one installation."""

    tree: Path
    var: Path
    state_dir: Path
    host_socket: Path
    port: int
    database_url: str | None
    listen: tuple[str, ...] = ("127.0.0.1",)

    @property
    def run(self) -> Path:
        """Sockets, locks, secrets and generated configuration."""
        return self.var / "run"

    @property
    def log(self) -> Path:
        """One rotated log per program."""
        return self.var / "log"

    @property
    def console_json(self) -> Path:
        """The URL and the demo team's credentials, for scripts (mode 0600)."""
        return self.run / "console.json"

    @property
    def ready(self) -> Path:
        """Exists, with the URL as its content, once the console serves and has been checked."""
        return self.run / "ready"

    @property
    def audit_spool(self) -> Path:
        """Audit entries that are not in the database yet; the web processes' own (mode 0700)."""
        return self.run / "audit"

    @property
    def sandboxes_ended_marker(self) -> Path:
        """Exists after `make down`, until the next start records it in the database."""
        return self.run / "sandboxes-ended"

    @property
    def restore_marker(self) -> Path:
        """Exists, with the backup's path, until a restore is complete: nothing starts before."""
        return self.var / "restoring"

    @property
    def lock(self) -> Path:
        """The lock file of the only `manage.py up` of this var, with its process id."""
        return self.run / "up.lock"

    @property
    def manager_socket(self) -> Path:
        """The process manager's control socket."""
        return self.run / "supervisor.sock"

    @property
    def cluster(self) -> Cluster:
        """The private PostgreSQL of this installation."""
        return Cluster(self.var / "pg", self.run / "pg")

    @property
    def url(self) -> str:
        """The console's URL for browsers."""
        return os.environ.get("ORKESTR_PUBLIC_URL", f"http://127.0.0.1:{self.port}").rstrip("/")

    @property
    def local_url(self) -> str:
        """The web process's URL for programs on this machine."""
        address = self.listen[0]
        reached = {"0.0.0.0": "127.0.0.1", "::": "127.0.0.1"}.get(address, address)  # noqa: S104
        return f"http://{f'[{reached}]' if ':' in reached else reached}:{self.port}"

    @property
    def public_url_unreachable(self) -> bool:
        """Whether the public URL is one that nothing serves, unless there is a proxy."""
        public = urlsplit(self.url)
        local = {"localhost", "127.0.0.1", "::1"}
        return (
            public.scheme == "http" and public.hostname not in local and set(self.listen) <= local
        )

    def environment(self) -> dict[str, str]:
        """The variables that every program gets in addition to the operator's environment."""
        return {
            "ORKESTR_VAR": str(self.var),
            "ORKESTR_STATE_DIR": str(self.state_dir),
            "ORKESTR_HOST_SOCKET": str(self.host_socket),
            "DATABASE_URL": self.database_url or self.cluster.url,
            "PORT": str(self.port),
            # The same for all: some wait for others.
            "ORKESTR_PATIENCE": f"{slowness():.1f}",
            "PYTHONUNBUFFERED": "1",
        }

    def prepare(self) -> None:
        """Create the directories that everything else expects, closed to other users.

        Raises ``StartError``.
        """
        for path in (self.tree, self.var, self.state_dir):
            if FORBIDDEN_CHARACTERS & set(str(path)):
                named = " ".join(sorted(FORBIDDEN_CHARACTERS))
                raise StartError(
                    f"the path {path} has one of {named} in it, which the process manager's "
                    "configuration cannot express: use another directory"
                )
        for setting, path in self._longest_sockets():
            if (size := len(os.fsencode(path))) > MAX_SOCKET_PATH:
                raise StartError(
                    f"{path} is too long a path for a Unix socket, {size} bytes where the kernel "
                    f"takes {MAX_SOCKET_PATH}: set {setting} to a shorter path"
                )
        for directory in (self.var, self.run, self.log):
            directory.mkdir(parents=True, exist_ok=True)
            # The users of web and PostgreSQL can traverse it to their own files, but not list it.
            directory.chmod(0o711)
        self.log.chmod(0o700)

    def _longest_sockets(self) -> list[tuple[str, Path]]:
        """The setting behind each socket, and its longest path: supervisord adds its process id."""
        manager = self.manager_socket.with_name(f"{self.manager_socket.name}.{MAX_PID}")
        found = [("ORKESTR_HOST_SOCKET or ORKESTR_VAR", self.host_socket), ("ORKESTR_VAR", manager)]
        if self.database_url is None:
            found.append(("ORKESTR_VAR", self.cluster.sockets / ".s.PGSQL.5432.lock"))
        return found


def layout_from(environment: Mapping[str, str] = os.environ) -> Layout:
    """The layout that the environment configures, with the README's defaults.

    Raises ``StartError``, with the fix, for an invalid one.
    """
    try:
        configured_slowness(environment)
        listen = listen_addresses(environment.get("ORKESTR_LISTEN"))
        trusted_proxies(environment.get("ORKESTR_TRUSTED_PROXIES"))
        web_processes(environment.get("ORKESTR_WEB_PROCESSES", ""))
        listed_networks("ORKESTR_WEBHOOK_PERMIT", environment)
    except ValueError as error:
        raise StartError(str(error)) from None
    var = Path(environment.get("ORKESTR_VAR") or TREE / "var").absolute()
    port = environment.get("PORT") or "8000"
    if not port.isdecimal() or not 0 < int(port) < 65536:
        raise StartError(f"PORT is {port!r}: give a number between 1 and 65535")
    return Layout(
        tree=TREE,
        var=var,
        state_dir=Path(environment.get("ORKESTR_STATE_DIR") or var / "host").absolute(),
        host_socket=Path(environment.get("ORKESTR_HOST_SOCKET") or var / "run/host.sock"),
        port=int(port),
        database_url=environment.get("DATABASE_URL") or None,
        listen=tuple(listen),
    )

"""An installation to be struck: two teams, what must outlive everything, and who starts it again.

The *neighbour* is another team's sandbox with a process of its own, and one that is paused. *Kept*
are a template and a snapshot of the team whose work is struck at.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import httpx
import psycopg

from hostruntime.host.paths import Instance
from hostruntime.host.rundir import RunDir
from tests.clients.making import Templates
from tests.processes import command_lines, own_mark
from tests.stack import Stack, running_stack, wait_for

# What systemd would wait (orkestr_console.runner.service, RestartSec=).
RESTART_SECONDS = 5.0
RESTART_TRIES = 12
# A client that gets no answer and no interim one for so long gives up, as the SDK does.
CLIENT_SECONDS = 30.0
BASE = "debian-12"
# Of what a team makes; bases are listed too, and everybody's.
OWN_IDS = ("sbx_", "tmpl_", "snap_")
MINT = """
from orkestr_console.accounts.models import Plan, Team
from orkestr_console.accounts.services import mint_token
from orkestr_console.accounts.actor import READ, WRITE
Plan.objects.filter(pk="team").update(api_requests_per_minute=100_000)
for name in ("struck", "neighbour"):
    team, _ = Team.objects.get_or_create(slug=name, defaults={"name": name, "plan_id": "team"})
    print(mint_token(team, name, [READ, WRITE])[1])
"""


@dataclass
class Neighbour:
    """Another team's sandboxes: ``process`` is a host pid that must stay, ``inside`` the same."""

    key: str
    sandbox: str = ""
    paused: str = ""
    process: int = 0
    inside: int = 0


@dataclass(frozen=True)
class Kept:
    """What of the struck team must be there after everything, as the API names it."""

    template: str
    snapshot: str


class Installation:
    """A running stack, and what was made in it for all cells."""

    def __init__(self, stack: Stack) -> None:
        self.stack = stack
        self._database: psycopg.Connection[tuple[Any, ...]] | None = None
        self.run_dir = RunDir.of(self.instance)
        self.key, key = self._mint()
        self._delete_all(keep=())
        self.neighbour = self._make_neighbour(key)
        self.kept = self._make_kept()

    @property
    def instance(self) -> Instance:
        """Its number on this machine."""
        with self.stack.host() as host:
            return Instance(host.health().instance)

    def client(self, key: str | None = None) -> httpx.Client:
        """A client as patient as the SDK, of the struck team unless another's key is given."""
        headers = {"Authorization": f"Bearer {key or self.key}"}
        return httpx.Client(
            base_url=self.stack.url, headers=headers, timeout=CLIENT_SECONDS, trust_env=False
        )

    def rows(self, query: str, *parameters: Any) -> list[tuple[Any, ...]]:
        """What the database says, past the console. Raises psycopg's errors while it is away."""
        if self._database is not None:
            # It may have been struck since, and come back.
            with suppress(psycopg.Error):
                return list(self._database.execute(query, parameters))
            self._database.close()
        place = self.stack.layout.cluster.url
        self._database = psycopg.connect(place, connect_timeout=10, autocommit=True)
        return list(self._database.execute(query, parameters))

    def image_of(self, template: str) -> str:
        """The id of a template's image, and of its build on the host."""
        query = "SELECT image_id FROM templates_app_template WHERE id = %s"
        return str(self.rows(query, template)[0][0])

    def boot(self, client: httpx.Client, **spec: Any) -> str:
        """A running sandbox's id; without a template or snapshot it is of the smallest base."""
        body = spec if {"template", "snapshot"} & set(spec) else {"template": BASE, **spec}
        answer = client.post("/v1/sandboxes", json={"timeout_seconds": 7200, **body})
        assert answer.status_code == 201, answer.text
        return str(answer.json()["id"])

    def run(self, client: httpx.Client, sandbox: str, command: str) -> str:
        """What a command that must succeed printed."""
        answer = client.post(f"/v1/sandboxes/{sandbox}/exec", json={"command": command})
        assert answer.status_code == 200, answer.text
        assert answer.json()["exit_code"] == 0, answer.text
        return str(answer.json()["stdout"])

    # What outlives everything ---------------------------------------------------------------

    def _mint(self) -> list[str]:
        done = self.stack.manage("shell", "--no-imports", "-c", MINT)
        assert done.returncode == 0, done.stderr
        return done.stdout.split()

    def _make_neighbour(self, key: str) -> Neighbour:
        found = Neighbour(key)
        mark = own_mark()
        with self.client(found.key) as client:
            found.sandbox = self.boot(client, network="restricted")
            found.paused = self.boot(client)
            self.run(client, found.sandbox, "echo kept | tee /root/kept > /workspace/kept")
            started = f"nohup sleep {mark} > /dev/null 2>&1 & echo $!"
            found.inside = int(self.run(client, found.sandbox, started))
            assert client.post(f"/v1/sandboxes/{found.paused}/pause").is_success
        found.process = next(
            pid for pid, line in command_lines().items() if line == f"sleep {mark}"
        )
        return found

    def _make_kept(self) -> Kept:
        with self.client() as client:
            template = Templates(client).ready(BASE, "echo baked > /root/baked", name="kept")
            source = self.boot(client, template=template)
            self.run(client, source, "echo snapped > /root/snapped")
            answer = client.post(f"/v1/sandboxes/{source}/snapshots", json={"name": "kept"})
            assert answer.status_code == 201, answer.text
            client.delete(f"/v1/sandboxes/{source}")
        return Kept(template, str(answer.json()["id"]))

    def harm(self) -> list[str]:
        """What happened to the neighbour or to what is kept; nothing, if all is as it should be."""
        return [*self._harm_to_neighbour(), *self._harm_to_kept()]

    def _harm_to_neighbour(self) -> list[str]:
        found = self.neighbour
        line = command_lines().get(found.process, "")
        if not line.startswith("sleep "):
            return [f"the neighbour's process {found.process} is gone"]
        with self.client(found.key) as client:
            command = f"kill -0 {found.inside} && cat /root/kept /workspace/kept"
            answer = client.post(f"/v1/sandboxes/{found.sandbox}/exec", json={"command": command})
        if answer.status_code != 200 or answer.json()["stdout"] != "kept\nkept\n":
            return [f"the neighbour's sandbox answers {answer.text[:300]}"]
        return []

    def _harm_to_kept(self) -> list[str]:
        wrong = []
        files = {"template": "/root/baked", "snapshot": "/root/snapped"}
        with self.client() as client:
            for kind, path in files.items():
                spec = {kind: getattr(self.kept, kind)}
                made = client.post("/v1/sandboxes", json=spec)
                if made.status_code != 201:
                    wrong.append(f"no sandbox of the kept {kind}: {made.text[:300]}")
                    continue
                address = f"/v1/sandboxes/{made.json()['id']}"
                read = client.post(f"{address}/exec", json={"command": f"cat {path}"})
                if read.status_code != 200 or not read.json()["stdout"]:
                    wrong.append(f"{path} of the kept {kind}: {read.text[:300]}")
                client.delete(address)
        return wrong

    def tidy(self) -> None:
        """Delete all that the struck team has but what is kept, as its people would."""
        self._delete_all(keep=(self.kept.template, self.kept.snapshot))

    def _delete_all(self, keep: Collection[str]) -> None:
        with self.client() as client:
            for kind, address in (
                ("sandboxes", "/v1/sandboxes"),
                ("templates", "/v1/templates"),
                ("snapshots", "/v1/sandboxes/snapshots"),
            ):
                rows = client.get(address, params={"limit": 200}).json()[kind]
                own = [row for row in rows if row["id"].startswith(OWN_IDS)]
                for row in own:
                    # What has ended stays as history.
                    if row["status"] != "terminated" and row["id"] not in keep:
                        client.delete(f"{address}/{row['id']}")

    def close(self) -> None:
        """Delete what was made for all cells."""
        if self._database is not None:
            self._database.close()
        with self.client(self.neighbour.key) as client:
            for sandbox in (self.neighbour.sandbox, self.neighbour.paused):
                client.delete(f"/v1/sandboxes/{sandbox}")
        with self.client() as client:
            client.delete(f"/v1/templates/{self.kept.template}")
            client.delete(f"/v1/sandboxes/snapshots/{self.kept.snapshot}")

    def start_over(self) -> None:
        """Stop what still runs, start it again, and tidy."""
        self.stack.stop()
        self.resurrect()
        self.tidy()

    # Who starts `up` again ------------------------------------------------------------------

    def resurrect(self) -> None:
        """Start `up` again after it was killed, as systemd does: as often as it takes."""
        for _ in range(RESTART_TRIES):
            time.sleep(RESTART_SECONDS)
            self.stack.layout.ready.unlink(missing_ok=True)
            with suppress(AssertionError):
                self.stack.start()
                return
        raise AssertionError(f"`up` does not start again\n{self.stack.explain()}")


@contextmanager
def installed() -> Iterator[Installation]:
    """A started installation for the length of a block."""
    with running_stack() as stack:
        installation = Installation(stack)
        wait_for(lambda: is_ready(stack), 60, stack.explain)
        try:
            yield installation
        finally:
            installation.close()


def is_ready(stack: Stack) -> bool:
    """Whether ``/readyz`` finds everything well."""
    try:
        return httpx.get(f"{stack.url}/readyz", timeout=10, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False

"""Many commands, clients that give up, and a database that goes: what the others notice."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

import httpx
import psycopg
import pytest

from tests.clients.making import Sandboxes
from tests.stack import Stack, wait_for

MANY = 150
GIVEN_UP = 60
UNLIMITED = httpx.Limits(max_connections=None)
MINT = """
from orkestr_console.accounts.models import Team
from orkestr_console.accounts.services import mint_token
from orkestr_console.accounts.actor import READ, WRITE
team, _ = Team.objects.get_or_create(slug="neighbour", defaults={"name": "N", "plan_id": "team"})
print(mint_token(team, "neighbour", [READ, WRITE])[1])
"""


@pytest.fixture(scope="module")
def neighbour(stack: Stack) -> str:
    """A token of another team."""
    done = stack.manage("shell", "--no-imports", "-c", MINT)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@asynccontextmanager
async def calling(stack: Stack, key: str) -> AsyncIterator[httpx.AsyncClient]:
    headers = {"Authorization": f"Bearer {key}"}
    async with httpx.AsyncClient(
        base_url=stack.url, headers=headers, timeout=120, trust_env=False, limits=UNLIMITED
    ) as client:
        yield client


async def booted(client: httpx.AsyncClient) -> str:
    answer = await client.post("/v1/sandboxes", json={"template": "debian-12"})
    assert answer.status_code == 201, answer.text
    return str(answer.json()["id"])


async def run(client: httpx.AsyncClient, sandbox: str, command: str) -> httpx.Response:
    return await client.post(f"/v1/sandboxes/{sandbox}/exec", json={"command": command})


async def meanwhile(
    client: httpx.AsyncClient, sandbox: str, others: asyncio.Future[list[httpx.Response]]
) -> Counter[int]:
    """What another team's calls are answered for as long as ``others`` go on."""
    seen: Counter[int] = Counter()
    while not others.done():
        seen[(await client.get("/v1/sandboxes")).status_code] += 1
        seen[(await run(client, sandbox, "true")).status_code] += 1
    return seen


async def storm(stack: Stack, neighbour: str) -> tuple[list[httpx.Response], Counter[int], int]:
    async with calling(stack, stack.api_key) as team, calling(stack, neighbour) as other:
        mine, theirs = await booted(team), await booted(other)
        limits = (await team.get("/v1/sandboxes/limits")).json()
        runs = asyncio.gather(*(run(team, mine, "sleep 15") for _ in range(MANY)))
        seen = await meanwhile(other, theirs, runs)
        answers = await runs
        after = await run(team, mine, "true")
        assert after.status_code == 200, "those that ended still count"
        await team.delete(f"/v1/sandboxes/{mine}")
        await other.delete(f"/v1/sandboxes/{theirs}")
    return answers, seen, limits["max_concurrent_commands"]


def test_a_team_runs_as_many_commands_as_it_may_and_its_neighbour_goes_on(
    stack: Stack, neighbour: str
) -> None:
    answers, seen, most = asyncio.run(storm(stack, neighbour))
    told = Counter(answer.status_code for answer in answers)
    assert told == {200: most, 429: MANY - most}
    refused = next(answer for answer in answers if answer.status_code == 429)
    assert int(refused.headers["Retry-After"]) > 0
    assert refused.json()["limit"] == "max_concurrent_commands"
    assert "concurrent commands" in refused.json()["detail"]
    # The neighbour was answered all the while, more often than the pool has connections.
    assert set(seen) == {200}
    assert seen[200] > 16


async def leave(stack: Stack, sandbox: str) -> None:
    """Ask for so many commands, and go before any has ended."""
    async with calling(stack, stack.api_key) as client:
        body = {"command": "sleep 300", "timeout_seconds": 600}
        asked = (
            client.post(f"/v1/sandboxes/{sandbox}/exec", json=body, timeout=3)
            for _ in range(GIVEN_UP)
        )
        await asyncio.gather(*asked, return_exceptions=True)


def test_clients_that_give_up_leave_nothing_taken(
    stack: Stack, neighbour: str, sandboxes: Sandboxes
) -> None:
    sandbox = sandboxes.boot("debian-12")
    asyncio.run(leave(stack, sandbox.id))
    with stack.host() as host:
        wait_for(lambda: host.commands() == {}, 60, stack.explain)
    headers = {"Authorization": f"Bearer {neighbour}"}
    with httpx.Client(base_url=stack.url, headers=headers, trust_env=False) as other:
        answers = [other.get("/v1/sandboxes") for _ in range(3 * GIVEN_UP)]
    assert {answer.status_code for answer in answers} == {200}
    assert sandbox.exec("true").exit_code == 0


def test_commands_of_a_web_process_that_died_count_no_more(
    stack: Stack, sandboxes: Sandboxes
) -> None:
    sandbox = sandboxes.boot("debian-12")

    async def until_killed() -> None:
        async with calling(stack, stack.api_key) as client:
            asked = [asyncio.ensure_future(run(client, sandbox.id, "sleep 50")) for _ in range(20)]
            with stack.host() as host:
                while sum((await asyncio.to_thread(host.commands)).values()) < 20:
                    await asyncio.sleep(0.1)
            stack.kill("web")
            await asyncio.gather(*asked, return_exceptions=True)

    web = stack.pid("web")
    asyncio.run(until_killed())
    with stack.host() as host:
        wait_for(lambda: host.commands() == {}, 60, stack.explain)
    stack.wait_until_restarted("web", web, 60)
    wait_for(lambda: answers(stack), 60, stack.explain)


@contextmanager
def team_locked(stack: Stack, key: str) -> Iterator[None]:
    """Hold the row that each create of the key's team waits for, each with a connection."""
    with psycopg.connect(stack.layout.cluster.url) as holder:
        lookup = key.split("_")[1]
        row = "SELECT id FROM accounts_team WHERE id = (%s) FOR UPDATE"
        team = "SELECT team_id FROM accounts_apitoken WHERE lookup = %s"
        found = holder.execute(team, [lookup]).fetchone()
        assert found is not None
        holder.execute(row, [found[0]])
        yield
        holder.rollback()


def test_a_team_that_waits_for_itself_keeps_nobody_else_waiting(
    stack: Stack, neighbour: str
) -> None:
    """More creates than there are connections, while the team's row is locked."""

    async def create(client: httpx.AsyncClient) -> httpx.Response:
        return await client.post("/v1/sandboxes", json={"template": "debian-12"})

    def others() -> set[int]:
        headers = {"Authorization": f"Bearer {neighbour}"}
        found = set()
        with httpx.Client(base_url=stack.url, headers=headers, timeout=30, trust_env=False) as own:
            for _ in range(20):
                found |= {own.get("/v1/sandboxes").status_code, own.get("/readyz").status_code}
                time.sleep(0.1)
        return found

    async def everything() -> tuple[list[httpx.Response], set[int]]:
        async with calling(stack, stack.api_key) as team:
            with team_locked(stack, stack.api_key):
                asked = [asyncio.ensure_future(create(team)) for _ in range(60)]
                told = await asyncio.to_thread(others)
            done = await asyncio.gather(*asked)
            for one in done:
                if one.is_success:
                    await team.delete(f"/v1/sandboxes/{one.json()['id']}")
            return list(done), told

    made, told = asyncio.run(everything())
    assert told == {200}
    # All had their turn; some may be beyond the plan.
    assert 201 in {answer.status_code for answer in made}
    assert [answer.text for answer in made if answer.status_code >= 500] == []


def answers(stack: Stack) -> bool:
    try:
        with stack.client() as client:
            return client.get("/v1/sandboxes").is_success
    except httpx.HTTPError:
        return False

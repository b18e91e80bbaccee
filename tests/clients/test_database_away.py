"""PostgreSQL is restarted under load, and is down: what each surface says, and what comes back."""

from __future__ import annotations

import asyncio
import html
import re
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest

from orkestr_console.runner.keeper import Keeper
from tests.clients.making import Sandboxes
from tests.stack import Stack, wait_for

MCP = "/api/sandboxes/mcp"
ACCEPT = {"Accept": "application/json, text/event-stream"}
AWAY = "database_unavailable"
# More than what a command takes to end, and a request waits for a connection.
RESTART_SECONDS = 6
RECIPE = "pip install pandas\necho 'a step with \"quotes\" & <angles>'"


def tool(name: str) -> dict[str, object]:
    """A call of an MCP tool that takes nothing."""
    call = {"name": name, "arguments": {}}
    return {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": call}


@pytest.fixture
def console(stack: Stack) -> Iterator[httpx.Client]:
    """A browser without scripts, signed in."""
    with httpx.Client(base_url=stack.url, trust_env=False, follow_redirects=True) as client:
        page = client.get("/sign-in/")
        form = {
            "csrfmiddlewaretoken": token_in(page.text),
            "email": stack.credentials.user,
            "password": stack.credentials.password,
        }
        answer = client.post("/sign-in/", data=form, headers={"Referer": f"{stack.url}/sign-in/"})
        assert answer.is_success, answer.text
        client.headers["Referer"] = stack.url
        yield client


def token_in(page: str) -> str:
    found = re.search(r'name="csrfmiddlewaretoken" value="(\w+)"', page)
    assert found is not None, page
    return found[1]


@contextmanager
def database_down(stack: Stack) -> Iterator[None]:
    """The database is stopped for the length of a block, and asked to come back after it."""
    keeper = Keeper(stack.layout, ())
    keeper._call("stopProcess", "postgres")
    try:
        yield
    finally:
        keeper.revive("postgres")


def answers(stack: Stack) -> bool:
    try:
        with stack.client() as client:
            return client.get("/v1/sandboxes").is_success
    except httpx.HTTPError:
        return False


async def load(stack: Stack, seen: Counter[str], stop: asyncio.Event) -> None:
    """Reads through REST and MCP for as long as the test says; what was no answer is noted."""
    headers = {"Authorization": f"Bearer {stack.api_key}", **ACCEPT}
    async with httpx.AsyncClient(
        base_url=stack.url, headers=headers, timeout=60, trust_env=False
    ) as client:
        while not stop.is_set():
            for answer in (
                await client.get("/v1/sandboxes"),
                await client.post(MCP, json=tool("list_sandboxes")),
            ):
                seen[kind_of(answer)] += 1


def kind_of(answer: httpx.Response) -> str:
    """In a word, what an answer is; one that is neither right nor properly refused is itself."""
    if answer.status_code == 503 and answer.json()["code"] == AWAY:
        return "away" if int(answer.headers["Retry-After"]) > 0 else "no Retry-After"
    if answer.status_code == 200 and AWAY in answer.text:
        return "away"
    if answer.status_code == 200 and '"isError":true' not in answer.text:
        return "fine"
    return f"{answer.status_code} {answer.text[:500]}"


def test_a_restart_under_load_is_a_503_at_worst_and_loses_no_command(
    stack: Stack, sandboxes: Sandboxes
) -> None:
    sandbox = sandboxes.boot("debian-12")

    async def everything() -> tuple[list[httpx.Response], Counter[str], Counter[str]]:
        during: Counter[str] = Counter()
        afterwards: Counter[str] = Counter()
        headers = {"Authorization": f"Bearer {stack.api_key}"}
        async with httpx.AsyncClient(
            base_url=stack.url, headers=headers, timeout=120, trust_env=False
        ) as client:
            address = f"/v1/sandboxes/{sandbox.id}/exec"
            body = {"command": "sleep 4; echo kept"}
            runs = [asyncio.ensure_future(client.post(address, json=body)) for _ in range(20)]
            stop = asyncio.Event()
            readers = [asyncio.ensure_future(load(stack, during, stop)) for _ in range(6)]
            await asyncio.sleep(2)
            await asyncio.to_thread(restart, stack)
            done = list(await asyncio.gather(*runs))
            await asyncio.to_thread(wait_for, lambda: answers(stack), 60, stack.explain)
            await asyncio.sleep(2)
            stop.set()
            await asyncio.gather(*readers)
            for _ in range(40):
                afterwards[kind_of(await client.get("/v1/sandboxes"))] += 1
        return done, during, afterwards

    runs, during, afterwards = asyncio.run(everything())
    assert [(run.status_code, run.json().get("stdout")) for run in runs] == [(200, "kept\n")] * 20
    # It was noticed, and told in one way.
    assert set(during) == {"fine", "away"}, during
    assert set(afterwards) == {"fine"}


def restart(stack: Stack) -> None:
    """Stop the database as an upgrade does, while commands end and others read."""
    with database_down(stack):
        time.sleep(RESTART_SECONDS)


def test_while_it_is_down_each_surface_says_so_and_loses_nothing(
    stack: Stack, console: httpx.Client, sandboxes: Sandboxes
) -> None:
    sandbox = sandboxes.boot("debian-12")
    csrf = token_in(console.get("/templates/new/").text)
    typed = {"csrfmiddlewaretoken": csrf, "name": "stack", "base_template": "debian-12"}
    typed |= {"recipe": RECIPE, "network": "restricted"}
    with database_down(stack):
        with stack.client() as client:
            read = client.get("/v1/sandboxes")
            created = client.post("/v1/sandboxes", json={"template": "debian-12"})
            asked = client.post(MCP, json=tool("list_sandboxes"), headers=ACCEPT)
        assert [kind_of(answer) for answer in (read, created, asked)] == ["away"] * 3
        page = console.get("/templates/")
        assert (page.status_code, page.headers["Retry-After"]) == (503, "2")
        assert "The console will be back in a moment" in page.text
        kept = console.post("/templates/new/", data=typed)
        assert kept.status_code == 503
        run = {"csrfmiddlewaretoken": csrf, "command": "true", "timeout_seconds": "5"}
        notice = console.post(
            f"/sandboxes/{sandbox.id}/exec/", data=run, headers={"HX-Request": "true"}
        )
        assert notice.status_code == 503
        assert "<html" not in notice.text and "Nothing you typed is lost" in notice.text
    wait_for(lambda: answers(stack), 60, stack.explain)
    # The form that the page kept is sent again as a browser would.
    fields = re.findall(r'<input type="hidden" name="(\w+)" value="([^"]*)">', kept.text)

    again = {name: html.unescape(value) for name, value in fields}
    assert again["recipe"] == RECIPE
    made = console.post("/templates/new/", data=again)
    assert made.is_success and made.url.path.startswith("/templates/tmpl_"), made.text
    with stack.client() as client:
        client.delete(f"/v1/templates/{made.url.path.split('/')[2]}")


def test_a_streamed_command_goes_on_while_the_database_is_away(
    stack: Stack, sandboxes: Sandboxes
) -> None:
    """Its token is looked at every few seconds, which is no reason to end it."""
    sandbox = sandboxes.boot("debian-12")
    body = {"command": "for i in 1 2 3; do sleep 8; echo $i; done", "stream": True}
    address = f"/v1/sandboxes/{sandbox.id}/exec"
    with stack.client() as client, client.stream("POST", address, json=body) as answer:
        lines = (line for line in answer.iter_lines() if line.startswith("data:"))
        assert "exec_started" in next(lines)
        with database_down(stack):
            assert "exec_chunk" in next(lines)
            assert "exec_chunk" in next(lines)
        assert "exec_exited" in list(lines)[-1]
    wait_for(lambda: answers(stack), 60, stack.explain)

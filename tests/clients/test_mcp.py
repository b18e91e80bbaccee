"""An agent with the official SDK's own client, over HTTP, on a live installation."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import httpx
import httpx2
import pytest
from mcp import Client
from mcp.client.streamable_http import streamable_http_client
from mcp_types import TextContent

from tests.clients.making import Templates
from tests.stack import Stack, free_port, wait_for

type Connect = Callable[..., AbstractAsyncContextManager[Client]]


def address(stack: Stack, port: int | None = None) -> str:
    """The one address an agent is given."""
    return f"http://127.0.0.1:{port or stack.layout.port}/api/sandboxes/mcp"


@asynccontextmanager
async def connected(url: str, key: str) -> AsyncIterator[Client]:
    """A session as any agent opens one: an address and a token."""
    headers = {"Authorization": f"Bearer {key}"}
    async with (
        httpx2.AsyncClient(headers=headers, trust_env=False, timeout=120) as http,
        Client(streamable_http_client(url, http_client=http)) as client,
    ):
        yield client


@pytest.fixture
def connect(stack: Stack) -> Connect:
    def open_session(key: str | None = None, port: int | None = None) -> Any:
        return connected(address(stack, port), key or stack.api_key)

    return open_session


async def done(client: Client, tool: str, /, **arguments: Any) -> dict[str, Any]:
    """Call a tool that must do it."""
    result = await client.call_tool(tool, arguments)
    assert not result.is_error, result
    assert isinstance(result.structured_content, dict)
    return result.structured_content


async def refused(client: Client, tool: str, /, **arguments: Any) -> str:
    """Call a tool that must refuse; what it says."""
    result = await client.call_tool(tool, arguments)
    assert result.is_error, result
    [block] = result.content
    assert isinstance(block, TextContent)
    return block.text


def count(program: str) -> str:
    """A command that says how many processes of a name there are."""
    return f"cat /proc/[0-9]*/comm | grep -cx {program} || true"


async def waited(client: Client, template: str) -> tuple[dict[str, Any], list[str]]:
    """Wait for a template to its end; how it is, and what was said on the way."""
    said: list[str] = []

    async def note(progress: float, total: float | None, message: str | None) -> None:
        said.append(message or "")

    while True:
        arguments = {"template_id": template, "timeout_seconds": 30}
        result = await client.call_tool("wait_for_template", arguments, progress_callback=note)
        assert isinstance(result.structured_content, dict), result
        if result.structured_content["status"] != "building":
            return result.structured_content, said


async def test_an_agent_builds_a_template_and_uses_it(connect: Connect) -> None:
    async with connect() as client:
        bases = await done(client, "list_base_templates")
        assert "debian-12" in [base["id"] for base in bases["bases"]]
        made = await done(
            client,
            "create_template",
            name="by an agent",
            base_template="debian-12",
            recipe=["echo baked > /root/made", "sleep 0.5"],
        )
        ready, said = await waited(client, made["id"])
        assert ready["status"] == "ready", ready
        assert "Running step 2 of 2: sleep 0.5" in said
        box = await done(client, "create_sandbox", template=made["id"])
        name = {"sandbox_id": box["id"]}
        ran = await done(client, "exec", **name, command="cat /root/made; echo err >&2; exit 4")
        assert (ran["stdout"], ran["stderr"], ran["exit_code"]) == ("baked\n", "err\n", 4)
        await done(client, "write_file", **name, path="/workspace/a/b.txt", content="ä\n")
        assert (await done(client, "read_file", **name, path="/workspace/a/b.txt"))[
            "content"
        ] == "ä\n"
        assert [e["name"] for e in (await done(client, "list_files", **name))["entries"]] == ["a"]
        assert (await done(client, "terminate_sandbox", **name))["status"] == "terminated"
        await done(client, "delete_template", template_id=made["id"])
        assert "not_found: " in await refused(client, "get_template", template_id=made["id"])


async def test_a_command_runs_on_in_the_background(connect: Connect) -> None:
    async with connect() as client:
        box = await done(client, "create_sandbox", template="debian-12")
        name = {"sandbox_id": box["id"]}
        command = 'echo "it\'s $A"; (exit 3) || until [ -e go ]; do sleep 0.02; done; exit 5'
        begun = await done(client, "exec_background", **name, command=command, env={"A": "b"})
        started = {**name, "command_id": begun["command_id"]}
        assert (begun["status"], begun["exit_code"]) == ("running", None)
        waited = await done(client, "read_command", **started, wait_seconds=1)
        assert (waited["status"], waited["output"]) == ("running", "it's b\n")
        await done(client, "write_file", **name, path="/workspace/go", content="")
        ended = await done(client, "read_command", **started, wait_seconds=50, offset=5)
        assert (ended["status"], ended["exit_code"], ended["output"]) == ("exited", 5, "b\n")
        assert (ended["next_offset"], ended["more"], ended["dropped_bytes"]) == (7, False, 0)
        # As much as a step may be.
        long = f"#{'!' * 250_000}{chr(39) * 11_000}\r\necho $0 | wc -l; exit 6\r\n"
        begun = await done(client, "exec_background", **name, command=long)
        assert len(begun["command"]) < 300
        started = {**name, "command_id": begun["command_id"]}
        ended = await done(client, "read_command", **started, wait_seconds=50)
        assert (ended["exit_code"], ended["output"]) == (6, "1\n")
        stays = await done(client, "exec_background", **name, command="sleep 300 & sleep 300")
        alive = await done(client, "exec", **name, command=f"kill -0 {stays['pid']} && echo yes")
        assert alive["stdout"] == "yes\n"
        started = {**name, "command_id": stays["command_id"]}
        for _ in range(2):
            stopped = await done(client, "stop_command", **started)
            assert (stopped["status"], stopped["exit_code"]) == ("killed", None)
        left = await done(client, "exec", **name, command=count("sleep"))
        assert left["stdout"] == "0\n"
        listed = (await done(client, "list_commands", **name))["commands"]
        assert [each["status"] for each in listed] == ["killed", "exited", "exited"]
        await done(client, "terminate_sandbox", **name)


async def test_an_agent_works_on_files(connect: Connect) -> None:
    async with connect() as client:
        options = {"template": "debian-12", "metadata": {"name": "files"}}
        box = await done(client, "create_sandbox", **options)
        name = {"sandbox_id": "files"}
        files = [
            {"path": "/workspace/run.sh", "content": "#!/bin/sh\necho one\n", "mode": "755"},
            {"path": "/workspace/other", "content": ""},
        ]
        assert (await done(client, "write_files", **name, files=files))["written"] == 2
        edit = {**name, "path": "/workspace/run.sh", "old": "echo one", "new": "seq 70000"}
        assert (await done(client, "edit_file", **edit))["first_line"] == 2
        assert (await refused(client, "edit_file", **edit)).startswith("text_not_found: ")
        image = r"printf '\211PNG\r\n\032\n' > p.png; head -c 90000 /dev/urandom >> p.png"
        ran = await done(client, "exec", **name, command=f"./run.sh > numbers; {image}")
        assert ran["sandbox"].startswith("running, ends in ")
        numbers = {**name, "path": "/workspace/numbers"}
        for asked, content in (
            ({"line": 69_999, "lines": 1}, "69999\n"),
            ({"line": -1}, "70000\n"),
            ({"offset": -6}, "70000\n"),
            ({"offset": 2, "limit": 2}, "2\n"),
        ):
            assert (await done(client, "read_file", **numbers, **asked))["content"] == content
        shown = await client.call_tool("read_file", {**name, "path": "/workspace/p.png"})
        assert shown.content[0].type == "image"
        assert shown.structured_content is not None
        assert shown.structured_content["size"] == 90_008
        fetched = await done(client, "get_file_url", **numbers)
        sent = await done(client, "get_file_url", **name, path="/workspace/up", upload=True)
        whole = httpx.get(fetched["url"], trust_env=False).content
        assert whole.endswith(b"\n70000\n")
        assert httpx.put(sent["url"], content=whole, trust_env=False).is_success
        same = await done(client, "exec", **name, command="cmp up numbers && echo same")
        assert same["stdout"] == "same\n"
        await done(client, "terminate_sandbox", **name)
        said = await refused(client, "list_files", sandbox_id=box["id"])
        assert "terminated on request" in said


async def test_a_failing_recipe_is_explained(connect: Connect, templates: Templates) -> None:
    async with connect() as client:
        made = await done(
            client,
            "create_template",
            name="fails",
            base_template="debian-12",
            recipe=["echo why it failed; exit 9"],
        )
        templates.made.append(made["id"])
        failed, _ = await waited(client, made["id"])
    assert (failed["status"], failed["error_code"]) == ("failed", "step_failed")
    assert "why it failed" in failed["error_message"]
    assert "why it failed" in failed["log_tail"]


async def test_output_of_any_size_is_bounded(connect: Connect) -> None:
    async with connect() as client:
        box = await done(client, "create_sandbox", template="debian-12")
        name = {"sandbox_id": box["id"]}
        ran = await done(client, "exec", **name, command="seq 2000000")
        assert ran["stdout"].startswith("1\n2\n")
        assert ran["stdout"].endswith("2000000\n")
        assert len(ran["stdout"]) < 31_000
        assert ran["omitted_bytes"] > 10_000_000
        said = await refused(client, "exec", **name, command="yes", timeout_seconds=60)
        assert said.startswith("exec_killed: ")
        ended = await done(client, "exec", **name, command=f"sleep 0.3; {count('yes')}")
        assert ended["stdout"] == "0\n"
        await done(client, "terminate_sandbox", **name)


async def test_two_agents_at_once_do_not_mix(connect: Connect) -> None:
    async def agent(word: str) -> list[str]:
        async with connect() as client:
            box = (await done(client, "create_sandbox", template="debian-12"))["id"]
            printed = []
            for number in range(20):
                command = f"echo {word} {number}"
                ran = await done(client, "exec", sandbox_id=box, command=command)
                printed.append(ran["stdout"])
            await done(client, "terminate_sandbox", sandbox_id=box)
            return printed

    one, two = await asyncio.gather(agent("one"), agent("two"))
    assert one == [f"one {n}\n" for n in range(20)]
    assert two == [f"two {n}\n" for n in range(20)]


async def test_long_commands_hold_up_nobody(connect: Connect) -> None:
    async with connect() as client:
        box = (await done(client, "create_sandbox", template="debian-12"))["id"]
        command = "echo >>begun; until [ -e go ]; do sleep 0.2; done; echo late"
        slow = [
            asyncio.create_task(done(client, "exec", sandbox_id=box, command=command))
            for _ in range(30)
        ]
        while True:
            begun = await done(client, "exec", sandbox_id=box, command="cat begun | wc -l")
            if begun["stdout"] == "30\n":
                break
            assert not any(task.done() for task in slow)
        assert (await done(client, "list_templates"))["templates"] is not None
        assert not any(task.done() for task in slow)
        await done(client, "write_file", sandbox_id=box, path="/workspace/go", content="")
        assert {answer["stdout"] for answer in await asyncio.gather(*slow)} == {"late\n"}
        await done(client, "terminate_sandbox", sandbox_id=box)


async def test_an_agent_that_leaves_does_not_stop_its_build(
    connect: Connect, templates: Templates
) -> None:
    async with connect() as client:
        made = await done(
            client,
            "create_template",
            name="left alone",
            base_template="debian-12",
            recipe=["sleep 3"],
        )
        templates.made.append(made["id"])
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1):
                await client.call_tool("wait_for_template", {"template_id": made["id"]})
    assert templates.finished(made["id"])["status"] == "ready"


async def test_an_agent_that_leaves_ends_its_command(connect: Connect) -> None:
    async with connect() as client:
        box = (await done(client, "create_sandbox", template="debian-12"))["id"]
    async with connect() as client:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1):
                await client.call_tool("exec", {"sandbox_id": box, "command": "sleep 55"})
    async with connect() as client:
        for _ in range(300):
            ran = await done(client, "exec", sandbox_id=box, command=count("sleep"))
            if ran["stdout"] == "0\n":
                break
            await asyncio.sleep(0.1)
        assert ran["stdout"] == "0\n"
        await done(client, "terminate_sandbox", sandbox_id=box)


async def test_any_web_process_answers_any_request(
    stack: Stack, connect: Connect, templates: Templates
) -> None:
    """A second process on the same database: neither lacks what the other was told."""
    port = free_port()
    second = subprocess.Popen(
        [sys.executable, "manage.py", "serve", f"--port={port}"],
        cwd=stack.layout.tree,
        env=stack.environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_for(lambda: healthy(port), 60, stack.explain)
        async with connect() as one, connect(port=port) as other:
            made = await done(
                one, "create_template", name="two", base_template="debian-12", recipe=["sleep 1"]
            )
            templates.made.append(made["id"])
            ready, said = await waited(other, made["id"])
            assert ready["status"] == "ready"
            assert any("step 1 of 1" in message for message in said)
            box = await done(other, "create_sandbox", template=made["id"])
            ran = await done(one, "exec", sandbox_id=box["id"], command="echo here")
            assert ran["stdout"] == "here\n"
            await done(other, "terminate_sandbox", sandbox_id=box["id"])
    finally:
        second.terminate()
        second.wait(30)


def healthy(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/healthz", trust_env=False).is_success
    except httpx.HTTPError:
        return False


async def test_a_wrong_token_gets_nowhere(stack: Stack) -> None:
    answer = httpx.post(
        address(stack),
        json={"jsonrpc": "2.0", "id": 1, "method": "tools/list"},
        headers={"Authorization": "Bearer ork_wrong", "Accept": "application/json"},
        trust_env=False,
    )
    assert (answer.status_code, answer.json()["code"]) == (401, "unauthenticated")


async def test_a_token_for_reading_may_not_write(stack: Stack, connect: Connect) -> None:
    key = stack.manage("mint_token", "--team=demo", "--scope=sandboxes:read").stdout.strip()
    async with connect(key) as client:
        names = [tool.name for tool in (await client.list_tools()).tools]
        assert "list_templates" in names
        assert "create_template" not in names
        said = await refused(client, "create_sandbox", template="debian-12")
        assert said.startswith("insufficient_scope: ")

"""Files as an agent reads, writes and edits them."""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator
from typing import Any

import pytest
from mcp_types import ImageContent

from hostruntime.wire.files import FilePart, WantedPart
from orkestr_console.mcp.file_tools import BINARY_BYTES, MAX_IMAGE_BYTES
from tests.fakes.host import FakeHost
from tests.mcp.conftest import Connect
from tests.mcp.test_tools import done, refused

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.usefixtures("host")]

PNG = b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 200
FILE = "/workspace/x"


async def sandbox(client: Any) -> dict[str, str]:
    """The arguments for a file of a new sandbox."""
    made = await done(client, "create_sandbox", template="debian-12")
    return {"sandbox_id": made["id"], "path": FILE}


async def test_an_image_comes_as_an_image(connect: Connect, key: str, host: FakeHost) -> None:
    async with connect(key) as client:
        file = await sandbox(client)
        host.write_file(file["sandbox_id"], FILE, PNG)
        shown = await client.call_tool("read_file", file)
        picture, said = shown.content
        assert isinstance(picture, ImageContent)
        assert picture.mime_type == "image/png"
        assert base64.b64decode(picture.data) == PNG
        assert shown.structured_content is not None
        assert shown.structured_content["size"] == len(PNG)
        assert str(len(PNG)) in said.text  # type: ignore[union-attr]
        # Whoever asks for bytes gets those.
        part = await done(client, "read_file", **file, limit=5)
        assert base64.b64decode(part["content"]) == PNG[:5]
        host.write_file(file["sandbox_id"], FILE, PNG[:8] + bytes(MAX_IMAGE_BYTES))
        assert "Make it smaller" in await refused(client, "read_file", **file)


async def test_what_is_no_text_is_kept_and_shown_in_part(
    connect: Connect, key: str, host: FakeHost
) -> None:
    async with connect(key) as client:
        file = await sandbox(client)
        for content in (b"\xff\xfe" * 5000, bytes(10_000)):
            host.write_file(file["sandbox_id"], FILE, content)
            part = await done(client, "read_file", **file)
            assert base64.b64decode(part["content"]) == content[:BINARY_BYTES]
            assert part["next_offset"] == BINARY_BYTES
            assert "get_file_url" in part["hint"]
            whole = await done(client, "read_file", **file, limit=20_000)
            assert base64.b64decode(whole["content"]) == content


@pytest.mark.parametrize(
    ("asked", "content", "offset", "following"),
    [
        ({"offset": 3, "limit": 4}, "1\n2\n", 3, 7),
        ({"offset": -4}, "\n20\n", None, None),
        ({"offset": -4, "limit": 3}, "\n20", None, "more"),
        ({"line": 3, "lines": 2}, "2\n3\n", 5, 9),
        ({"line": -2}, "19\n20\n", None, None),
        ({"lines": 1}, "ä\n", 0, 3),
        ({"offset": 1, "limit": 3}, "\n1", 2, 4),
    ],
)
async def test_a_part_is_read_by_bytes_or_by_lines(
    connect: Connect,
    key: str,
    host: FakeHost,
    asked: dict[str, int],
    content: str,
    offset: int | None,
    following: object,
) -> None:
    text = "ä\n" + "".join(f"{number}\n" for number in range(1, 21))
    async with connect(key) as client:
        file = await sandbox(client)
        host.write_file(file["sandbox_id"], FILE, text.encode())
        part = await done(client, "read_file", **file, **asked)
        assert (part["content"], part["size"]) == (content, len(text.encode()))
        if offset is not None:
            assert (part["offset"], part["next_offset"]) == (offset, following)
        assert (part["next_offset"] is None) is (following is None)


async def test_no_more_of_a_file_is_fetched_than_is_shown(
    connect: Connect, key: str, host: FakeHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also from a host that knows no bound, and of a file that never ends."""
    wanted: list[WantedPart] = []
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        while True:
            sent += 10_000
            yield b"x" * 10_000

    async with connect(key) as client:
        file = await sandbox(client)
        host.write_file(file["sandbox_id"], FILE, b"x")
        honest = host.read_part

        class Opening:
            def __init__(self, sandbox_id: str, path: str, part: WantedPart) -> None:
                wanted.append(part)
                self.real = honest(sandbox_id, path, WantedPart())

            async def __aenter__(self) -> tuple[FilePart, AsyncIterator[bytes]]:
                return (await self.real.__aenter__())[0], endless()

            async def __aexit__(self, *error: Any) -> None:
                await self.real.__aexit__(None, None, None)

        monkeypatch.setattr(host, "read_part", Opening)
        part = await done(client, "read_file", **file, offset=-(10**12))
        assert len(part["content"]) == 30_000
        assert sent == 30_000
        assert wanted == [WantedPart(last=10**12, most=30_000)]


async def test_what_can_not_be_read_is_said(connect: Connect, key: str, host: FakeHost) -> None:
    async with connect(key) as client:
        file = await sandbox(client)
        host.write_file(file["sandbox_id"], FILE, b"one\ntwo\n")
        assert (await done(client, "read_file", **file, offset=8))["content"] == ""
        for wrong, said in (
            ({"offset": 9}, "has only 8 bytes"),
            ({"line": 3}, "has only 2 lines"),
            ({"line": 0}, "must be 1 or more"),
            ({"line": 1, "offset": 1}, "can't be used together"),
        ):
            assert said in await refused(client, "read_file", **file, **wrong)
        directory = await refused(client, "read_file", **{**file, "path": "/workspace"})
        assert directory.startswith("is_a_directory: ")
        assert "use list_files" in directory
        assert "sandbox: running, ends in " in directory
        host.write_file(file["sandbox_id"], FILE, b"")
        assert (await done(client, "read_file", **file))["content"] == ""


async def test_text_is_replaced_where_it_is_meant(
    connect: Connect, key: str, host: FakeHost
) -> None:
    async with connect(key) as client:
        file = await sandbox(client)
        host.write_file(file["sandbox_id"], FILE, b"a = 1\nb = 1\n\xff")
        edited = await done(client, "edit_file", **file, old="b = 1", new="b\0= 2")
        assert (edited["replaced"], edited["first_line"]) == (1, 2)
        assert host.booted[file["sandbox_id"]].files[FILE] == b"a = 1\nb\0= 2\n\xff"
        said = await refused(client, "edit_file", **file, old="=", new="==")
        assert said.startswith("text_not_found: ")
        assert "lines 1, 2" in said
        edited = await done(client, "edit_file", **file, old="=", new="", replace_all=True)
        assert edited["replaced"] == 2
        for wrong in ({"old": ""}, {"old": "x" * 2**21}, {"path": "/etc/passwd"}):
            arguments = {**file, "old": "a", "new": "b", **wrong}
            assert (await client.call_tool("edit_file", arguments)).is_error, wrong


async def test_several_files_are_written_each_by_itself(
    connect: Connect, key: str, host: FakeHost
) -> None:
    async with connect(key) as client:
        file = await sandbox(client)
        files = [
            {"path": "/workspace/a.sh", "content": "ä\0", "mode": "755"},
            {"path": "/etc/no", "content": "x"},
            {"path": "/tmp/b", "content": "/w==", "encoding": "base64"},
        ]
        made = await done(client, "write_files", sandbox_id=file["sandbox_id"], files=files)
        assert (made["written"], made["failed"]) == (2, 1)
        assert made["results"][1]["error"].startswith("not_permitted: /etc/no is not below ")
        box = host.booted[file["sandbox_id"]]
        assert (box.files["/workspace/a.sh"], box.files["/tmp/b"]) == ("ä\0".encode(), b"\xff")
        assert host.modes[file["sandbox_id"], "/workspace/a.sh"] == 0o755
        for wrong in ({"path": "/tmp/\0", "content": ""}, {"path": "/tmp/x"}, {"mode": "u+x"}):
            arguments = {"sandbox_id": file["sandbox_id"], "files": [wrong]}
            assert (await client.call_tool("write_files", arguments)).is_error


async def test_an_address_to_send_or_fetch_a_file_is_made(connect: Connect, key: str) -> None:
    async with connect(key) as client:
        file = await sandbox(client)
        fetched = await done(client, "get_file_url", **file)
        assert fetched["method"] == "GET"
        assert fetched["url"].startswith("http://testserver/v1/transfers/")
        sent = await done(client, "get_file_url", **file, upload=True, expires_in=60)
        assert (sent["method"], fetched["url"] in fetched["example"]) == ("PUT", True)

"""``/v1/sandboxes/{id}/files`` and what is below it."""

from __future__ import annotations

import base64
from typing import Any

import pytest
from django.test import Client

from hostruntime.errors import ContainerGone, HostUnavailable
from sandboxes_app.models import Sandbox, Snapshot
from tests.api.asking import post, refusal
from tests.fakes.host import FakeHost

MEBIBYTE = 1024 * 1024
NUL_PATH = "/workspace/a\0b"


@pytest.fixture
def files(api: Client, host: FakeHost) -> str:
    answer = post(api, "/v1/sandboxes", {"template": "debian-12"})
    return f"/v1/sandboxes/{answer.json()['id']}/files"


def encoded(data: bytes) -> str:
    return base64.b64encode(data).decode()


def write(api: Client, files: str, path: str, data: bytes = b"x", **fields: Any) -> Any:
    return post(api, files, {"path": path, "content": encoded(data), **fields})


def test_what_is_written_is_read(api: Client, files: str) -> None:
    data = bytes(range(256))
    assert write(api, files, "/workspace/a/b", data, mode=0o600).status_code == 200
    said = api.get(files, {"path": "/workspace/a/b"}).json()
    assert said["is_dir"] is False
    assert base64.b64decode(said["content"]) == data


def test_a_directory_is_listed(api: Client, files: str) -> None:
    write(api, files, "/workspace/notes.txt", b"abc")
    post(api, f"{files}/mkdir", {"path": "/workspace/sub"})
    said = api.get(files, {"path": "/workspace"}).json()
    assert said["is_dir"] is True
    assert [(e["name"], e["is_dir"]) for e in said["entries"]] == [
        ("notes.txt", False),
        ("sub", True),
    ]
    first = said["entries"][0]
    assert first.keys() == {"name", "is_dir", "size", "mode", "modified_at"}
    assert (first["size"], first["modified_at"][-1]) == (3, "Z")


def test_stat_tells_of_files_directories_and_what_is_not_there(api: Client, files: str) -> None:
    write(api, files, "/tmp/x", b"abc")
    there = api.get(f"{files}/stat", {"path": "/tmp/x"}).json()
    assert (there["exists"], there["is_dir"], there["size"], there["mode"]) == (
        True,
        False,
        3,
        0o644,
    )
    assert there["modified_at"].endswith("Z")
    assert api.get(f"{files}/stat", {"path": "/tmp"}).json()["is_dir"] is True
    missing = api.get(f"{files}/stat", {"path": "/tmp/y"})
    assert missing.status_code == 200
    assert (missing.json()["exists"], missing.json()["path"]) == (False, "/tmp/y")


def test_a_file_is_moved_and_deleted(api: Client, files: str) -> None:
    write(api, files, "/tmp/x", b"abc")
    moved = post(api, f"{files}/move", {"source": "/tmp/x", "destination": "/workspace/y"})
    assert moved.status_code in {200, 204}
    assert api.get(f"{files}/stat", {"path": "/tmp/x"}).json()["exists"] is False
    assert api.delete(f"{files}?path=/workspace/y").status_code == 204
    refusal(api.get(files, {"path": "/workspace/y"}), 404, "file_not_found")


def test_a_directory_is_made_with_or_without_its_parents(api: Client, files: str) -> None:
    assert post(api, f"{files}/mkdir", {"path": "/workspace/a/b"}).status_code in {200, 204}
    assert post(api, f"{files}/mkdir", {"path": "/workspace/a/b"}).status_code in {200, 204}
    body = {"path": "/workspace/c/d", "parents": False}
    refusal(post(api, f"{files}/mkdir", body), 404, "file_not_found")
    body = {"path": "/workspace/a", "parents": False}
    refusal(post(api, f"{files}/mkdir", body), 409, "file_conflict")


def test_a_batch_reports_each_file_and_stops_at_none(api: Client, files: str) -> None:
    rows: list[dict[str, Any]] = [
        {"path": "/workspace/a", "content": encoded(b"12"), "mode": 0o644},
        {"path": "/etc/passwd", "content": encoded(b"no")},
        {"path": "/workspace/b", "content": "no base64!"},
        {"path": "/workspace", "content": ""},
        {"path": "relative", "content": ""},
        {"path": "/tmp/d", "content": "", "mode": -1},
        {"path": 7, "content": ""},
        {"path": "/tmp/e", "content": "", "more": True},
        {"path": "/tmp/c", "content": ""},
    ]
    said = post(api, f"{files}/batch", {"files": rows}).json()["results"]
    assert [row["path"] or 7 for row in said] == [row["path"] for row in rows]
    assert [row["bytes_written"] for row in said] == [2, *[None] * 7, 0]
    codes = [row["error"] and row["error"]["code"] for row in said]
    invalid = ["invalid_request"] * 4
    assert codes == [None, "not_permitted", "invalid_request", "not_permitted", *invalid, None]


@pytest.mark.parametrize("count", [0, 65])
def test_a_batch_has_one_to_64_files(api: Client, files: str, count: int) -> None:
    rows = [{"path": f"/tmp/{n}", "content": ""} for n in range(count)]
    said = refusal(post(api, f"{files}/batch", {"files": rows}), 400, "invalid_request")
    assert said["detail"].startswith("files: ")


@pytest.mark.parametrize(
    "path",
    [
        "/etc/passwd",
        "/",
        "/workspace",
        "/workspace/",
        "/workspace/..",
        "/workspace/../etc/passwd",
        "/workspaces/x",
        "/tmp/../root/x",
        "//etc/x",
        "/proc/1/mem",
    ],
)
def test_only_what_is_below_the_writable_roots_is_changed(
    api: Client, files: str, path: str
) -> None:
    write(api, files, "/tmp/x")
    for answer in (
        write(api, files, path),
        api.delete(f"{files}?path={path}"),
        post(api, f"{files}/mkdir", {"path": path}),
        post(api, f"{files}/move", {"source": "/tmp/x", "destination": path}),
        post(api, f"{files}/move", {"source": path, "destination": "/tmp/y"}),
    ):
        said = refusal(answer, 400, "not_permitted")
        assert "/workspace" in said["detail"]
    assert api.get(f"{files}/stat", {"path": "/tmp/x"}).json()["exists"] is True


def test_reading_is_not_bound_to_the_writable_roots(api: Client, files: str) -> None:
    assert api.get(files, {"path": "/etc"}).json()["is_dir"] is True


@pytest.mark.parametrize(
    ("query", "says"),
    [({}, "absolute"), ({"path": ""}, "absolute"), ({"path": "notes.txt"}, "absolute"),
     ({"path": "/" + "x" * 5000}, "4,096")],
)  # fmt: skip
def test_a_path_that_is_none_is_refused(
    api: Client, files: str, query: dict[str, str], says: str
) -> None:
    for path in (files, f"{files}/stat"):
        said = refusal(api.get(path, query), 400, "invalid_request")
        assert said["detail"].startswith("path: ")
        assert says in said["detail"]
    refusal(api.delete(f"{files}?path={query.get('path', '')}"), 400, "invalid_request")


def test_nul_in_a_path_is_refused(api: Client, files: str) -> None:
    refusal(write(api, files, NUL_PATH), 400, "invalid_request")
    refusal(api.get(files, {"path": NUL_PATH}), 400, "invalid_request")


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "path"),
        ({"path": "/tmp/x"}, "content"),
        ({"path": "/tmp/x", "content": None}, "content"),
        ({"path": "/tmp/x", "content": "no base64!"}, "content"),
        ({"path": "/tmp/x", "content": "YQ"}, "content"),
        ({"path": "/tmp/x", "content": "YQ==\n"}, "content"),
        ({"path": "/tmp/x", "content": "é"}, "content"),
        ({"path": "/tmp/x", "content": "", "mode": "0644"}, "mode"),
        ({"path": "/tmp/x", "content": "", "mode": 0o10000}, "mode"),
        ({"path": "/tmp/x", "content": "", "mode": -1}, "mode"),
        ({"path": "/tmp/x", "content": "", "owner": "root"}, "owner"),
    ],
)
def test_a_file_that_cannot_be_written_names_the_field(
    api: Client, files: str, body: dict[str, Any], field: str
) -> None:
    said = refusal(post(api, files, body), 400, "invalid_request")
    assert said["detail"].startswith(f"{field}: "), said
    assert api.get(f"{files}/stat", {"path": "/tmp/x"}).json()["exists"] is False


def test_a_file_of_16_mebibytes_is_taken_and_read_and_one_more_byte_is_not(
    api: Client, host: FakeHost, files: str
) -> None:
    largest = b"x" * (16 * MEBIBYTE)
    assert write(api, files, "/tmp/large", largest).status_code == 200
    read = api.get(files, {"path": "/tmp/large"}).json()["content"]
    assert len(base64.b64decode(read)) == len(largest)
    refusal(write(api, files, "/tmp/larger", largest + b"x"), 413, "payload_too_large")
    box = files.split("/")[3]
    host.booted[box].files["/tmp/larger"] = largest + b"x"
    refusal(api.get(files, {"path": "/tmp/larger"}), 413, "payload_too_large")


def test_a_directory_is_not_deleted_with_what_is_in_it(api: Client, files: str) -> None:
    write(api, files, "/workspace/a/b")
    said = refusal(api.delete(f"{files}?path=/workspace/a"), 409, "is_a_directory")
    assert "rm -r" in said["detail"]
    assert api.get(f"{files}/stat", {"path": "/workspace/a/b"}).json()["exists"] is True


def test_what_is_not_there_is_not_found(api: Client, files: str) -> None:
    refusal(api.get(files, {"path": "/tmp/none"}), 404, "file_not_found")
    refusal(api.delete(f"{files}?path=/tmp/none"), 404, "file_not_found")
    body = {"source": "/tmp/none", "destination": "/tmp/y"}
    refusal(post(api, f"{files}/move", body), 404, "file_not_found")


def test_a_sandbox_that_is_gone_is_not_mistaken_for_a_missing_file(
    api: Client, host: FakeHost, files: str
) -> None:
    host.booted.clear()
    refusal(api.get(files, {"path": "/tmp/none"}), 409, "sandbox_not_running")
    assert Sandbox.objects.get().status == "failed"


def test_a_sandbox_that_ended_has_no_files(api: Client, files: str) -> None:
    api.delete(files.removesuffix("/files"))
    refusal(api.get(files, {"path": "/tmp"}), 409, "sandbox_not_running")
    refusal(write(api, files, "/tmp/x"), 409, "sandbox_not_running")


def test_a_token_that_may_only_read_changes_nothing(read_only_api: Client, files: str) -> None:
    for answer in (
        write(read_only_api, files, "/tmp/x"),
        read_only_api.delete(f"{files}?path=/tmp/x"),
        post(read_only_api, f"{files}/mkdir", {"path": "/tmp/x"}),
        post(read_only_api, f"{files}/move", {"source": "/tmp/x", "destination": "/tmp/y"}),
        post(read_only_api, f"{files}/batch", {"files": [{"path": "/tmp/x", "content": ""}]}),
    ):
        refusal(answer, 403, "insufficient_scope")
    assert read_only_api.get(files, {"path": "/tmp"}).status_code == 200


def gone(*_: Any, **__: Any) -> None:
    raise ContainerGone("The sandbox is not running.")


def away(*_: Any) -> None:
    raise HostUnavailable("The host does not answer.")


def test_a_host_that_goes_away_while_it_is_asked_why_is_unavailable(
    api: Client, files: str, host: FakeHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    sandbox = files.removesuffix("/files")
    monkeypatch.setattr(host, "sandbox", away)
    for asked in ("stat", "background_commands", "pause_sandbox", "create_snapshot"):
        monkeypatch.setattr(host, asked, gone)
    refusal(api.get(f"{files}/stat", {"path": "/workspace/x"}), 503, "host_unavailable")
    refusal(api.get(f"{sandbox}/commands"), 503, "host_unavailable")
    refusal(post(api, f"{sandbox}/snapshots", {}), 409, "sandbox_not_running")
    assert Snapshot.objects.get().status == "failed"
    refusal(post(api, f"{sandbox}/pause", {}), 503, "host_unavailable")
    # Nobody knows whether it is.
    assert Sandbox.objects.get().status == "pausing"

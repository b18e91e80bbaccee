"""Addresses that need no token: what they allow, to whom, how often and until when."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Any

import pytest
from asgiref.sync import async_to_sync
from django.core.signing import Signer
from django.test import Client

from hostruntime.errors import HostFault, NoSpace, NotFound
from orkestr_console.accounts.models import ApiToken, AuditEntry, Team
from orkestr_console.accounts.services import revoke_token
from orkestr_console.http.threads import in_thread
from sandboxes_app.models import Sandbox, SandboxStatus, UsedUpload
from sandboxes_app.services import transfers
from sandboxes_app.services.transfers import Address
from tests.api.asking import post, refusal
from tests.conftest import api_client
from tests.fakes.host import FakeHost

DATA = bytes(range(256)) * 20
PATH = "/workspace/a/big.bin"


@pytest.fixture
def anybody() -> Client:
    return api_client(None)


@pytest.fixture
def files(api: Client, host: FakeHost) -> str:
    answer = post(api, "/v1/sandboxes", {"template": "debian-12"})
    return f"/v1/sandboxes/{answer.json()['id']}/files"


def sandbox_of(files: str) -> str:
    return files.split("/")[3]


def presign(api: Client, files: str, kind: str, path: str = PATH, **fields: Any) -> Any:
    answer = post(api, f"{files}/presign-{kind}", {"path": path, **fields})
    assert answer.status_code == 200, answer.content
    return answer.json()


def send(client: Client, made: Any, data: bytes = DATA) -> Any:
    return client.put(made["url"], data, content_type="application/octet-stream")


def fetch(client: Client, made: Any) -> Any:
    return client.get(made["url"])


def content(answer: Any) -> bytes:
    async def read() -> bytes:
        return b"".join([part async for part in answer.streaming_content])

    return async_to_sync(read)()


@pytest.fixture
def stored(api: Client, files: str, host: FakeHost) -> str:
    host.write_file(sandbox_of(files), PATH, DATA)
    return str(presign(api, files, "download")["url"])


def test_an_address_says_what_it_is_for(api: Client, files: str) -> None:
    made = presign(api, files, "upload", "/workspace/./a//big.bin", expires_in=60)
    assert made.keys() == {"url", "method", "path", "expires_at"}
    assert (made["method"], made["path"]) == ("PUT", PATH)
    assert made["url"].startswith("http://testserver/v1/transfers/")
    assert made["expires_at"].endswith("Z")
    assert presign(api, files, "download")["method"] == "GET"


@pytest.mark.parametrize("seconds", [0, 59, 3601, "60", None])
def test_its_time_has_bounds(api: Client, files: str, seconds: Any) -> None:
    for kind in ("upload", "download"):
        body = {"path": PATH, "expires_in": seconds}
        refusal(post(api, f"{files}/presign-{kind}", body), 400, "invalid_request")


def test_uploads_only_go_where_files_may_be_written(api: Client, files: str) -> None:
    for path in ("/etc/passwd", "/workspace/../etc/x", "/workspace"):
        answer = post(api, f"{files}/presign-upload", {"path": path})
        refusal(answer, 400, "not_permitted")


def test_what_is_sent_to_one_is_fetched_from_another(
    api: Client, anybody: Client, files: str, host: FakeHost
) -> None:
    answer = send(anybody, presign(api, files, "upload"))
    assert answer.json() == {"path": PATH, "bytes_written": len(DATA)}
    assert host.modes[sandbox_of(files), PATH] == 0o644
    answer = anybody.get(presign(api, files, "download")["url"])
    assert content(answer) == DATA
    assert answer.status_code == 200
    assert answer.headers["Content-Length"] == str(len(DATA))
    assert answer.headers["Accept-Ranges"] == "bytes"


def test_no_browser_shows_a_file_as_a_page_of_ours(
    api: Client, anybody: Client, files: str, host: FakeHost
) -> None:
    path = '/workspace/a "quoted" ü.html'
    host.write_file(sandbox_of(files), path, b"<script>")
    headers = anybody.get(presign(api, files, "download", path)["url"]).headers
    assert headers["Content-Type"] == "application/octet-stream"
    assert headers["Content-Disposition"].startswith("attachment; filename")
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Content-Security-Policy"].startswith("default-src 'none'")
    assert headers["Cache-Control"] == "no-store"


def test_a_file_may_have_any_name(api: Client, anybody: Client, files: str, host: FakeHost) -> None:
    path = "/workspace/a\n"
    host.write_file(sandbox_of(files), path, DATA)
    answer = anybody.get(presign(api, files, "download", path)["url"])
    assert (answer.status_code, content(answer)) == (200, DATA)
    assert answer.headers["Content-Disposition"] == "attachment; filename*=utf-8''a%0A"


@pytest.mark.parametrize(
    ("wanted", "expected", "described"),
    [
        ("bytes=0-0", slice(0, 1), "bytes 0-0/5120"),
        ("bytes=5000-", slice(5000, None), "bytes 5000-5119/5120"),
        ("bytes=5000-999999", slice(5000, None), "bytes 5000-5119/5120"),
        ("bytes=-10", slice(-10, None), "bytes 5110-5119/5120"),
        ("Bytes= 1-2 ", slice(1, 3), "bytes 1-2/5120"),
    ],
)
def test_a_part_can_be_fetched(
    anybody: Client, stored: str, wanted: str, expected: slice, described: str
) -> None:
    answer = anybody.get(stored, headers={"Range": wanted})
    assert answer.status_code == 206
    assert content(answer) == DATA[expected]
    assert answer.headers["Content-Range"] == described
    assert answer.headers["Content-Length"] == str(len(DATA[expected]))


@pytest.mark.parametrize("wanted", ["bytes=1-2,4-5", "lines=1-2", "bytes=9-2", "bytes=-", "x", ""])
def test_a_range_that_may_be_ignored_is(anybody: Client, stored: str, wanted: str) -> None:
    answer = anybody.get(stored, headers={"Range": wanted})
    assert (answer.status_code, content(answer)) == (200, DATA)


def test_a_part_of_what_it_was_before_is_not_given_of_what_it_is(
    anybody: Client, stored: str
) -> None:
    answer = anybody.get(stored, headers={"Range": "bytes=0-9", "If-Range": '"an earlier one"'})
    assert (answer.status_code, content(answer)) == (200, DATA)


def test_a_range_outside_of_the_file_says_its_size(anybody: Client, stored: str) -> None:
    answer = anybody.get(stored, headers={"Range": "bytes=5120-"})
    refusal(answer, 416, "range_not_satisfiable")
    assert answer.headers["Content-Range"] == "bytes */5120"


def test_a_head_says_as_much_as_a_get(anybody: Client, stored: str) -> None:
    answer = anybody.head(stored)
    assert (answer.status_code, answer.content) == (200, b"")
    assert answer.headers["Content-Length"] == str(len(DATA))


def test_a_download_can_be_repeated_and_an_upload_can_not(
    api: Client, anybody: Client, files: str, stored: str
) -> None:
    for _ in range(3):
        assert content(anybody.get(stored)) == DATA
    made = presign(api, files, "upload")
    assert send(anybody, made).status_code == 200
    said = refusal(send(anybody, made, b"other"), 403, "address_used")
    assert "presign-upload" in said["detail"]
    assert content(anybody.get(stored)) == DATA


def test_an_upload_that_failed_can_be_tried_again(
    api: Client, anybody: Client, files: str, host: FakeHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = presign(api, files, "upload")

    async def full(*_: Any) -> int:
        raise NoSpace("There is no space left for it; delete something first.")

    with monkeypatch.context() as patched:
        patched.setattr(host, "write_stream", full)
        refusal(send(anybody, made), 409, "no_space")
    assert not UsedUpload.objects.exists()
    assert send(anybody, made).status_code == 200


def test_a_client_that_leaves_before_the_body_has_not_used_its_address(
    api: Client, files: str, host: FakeHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = presign(api, files, "upload")["url"].rpartition("/")[2]
    asked, gone, claim = threading.Event(), threading.Event(), transfers.claim

    def claim_late(claimed: Address) -> None:
        asked.set()
        assert gone.wait(20)
        claim(claimed)

    monkeypatch.setattr(transfers, "claim", claim_late)

    async def leave_early() -> None:
        begun = asyncio.ensure_future(transfers.begin_upload(address, None))
        while not asked.is_set():
            await asyncio.sleep(0.01)
        begun.cancel()
        await asyncio.sleep(0.01)
        gone.set()
        with pytest.raises(asyncio.CancelledError):
            await begun

    async_to_sync(leave_early)()
    assert not UsedUpload.objects.exists()


def test_used_addresses_are_forgotten_once_they_have_expired(
    api: Client, anybody: Client, files: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = presign(api, files, "upload", expires_in=60)
    send(anybody, made)
    transfers.forget_expired()
    assert UsedUpload.objects.count() == 1
    UsedUpload.objects.update(expires_at="2020-01-01T00:00:00Z")
    transfers.forget_expired()
    assert not UsedUpload.objects.exists()


def test_an_address_ends(api: Client, anybody: Client, files: str, stored: str) -> None:
    for url, client in ((presign(api, files, "upload")["url"], send), (stored, fetch)):
        address = Address.read(url.rpartition("/")[2])
        over = replace(address, expires=int(time.time()) - 1)
        answer = client(anybody, {"url": f"/v1/transfers/{over.signed()}"})
        said = refusal(answer, 403, "address_expired")
        assert "presign" in said["detail"]


def test_an_address_is_for_one_method(
    api: Client, anybody: Client, files: str, stored: str
) -> None:
    made = presign(api, files, "upload")
    for answer in (anybody.get(made["url"]), anybody.put(stored, b"x")):
        refusal(answer, 405, "method_not_allowed")


@pytest.mark.parametrize("change", ["sandbox", "method", "path", "expires", "token", "nonce"])
def test_no_part_of_an_address_can_be_changed(
    api: Client, anybody: Client, files: str, stored: str, change: str
) -> None:
    text = stored.rpartition("/")[2]
    values = vars(Address.read(text)) | {change: 4102444800 if change == "expires" else "other"}
    forged = Signer(salt=transfers.SALT).sign_object(list(values.values())).partition(":")[0]
    signature = text.partition(":")[2]
    for address in (f"{forged}:{signature}", forged, text[:-1], f"{text}x", "x", ":", "a:b"):
        refusal(anybody.get(f"/v1/transfers/{address}"), 403, "address_invalid")


def test_what_else_the_console_signs_is_no_address(anybody: Client, stored: str) -> None:
    payload = list(vars(Address.read(stored.rpartition("/")[2])).values())
    signed = Signer(salt="another").sign_object(payload)
    refusal(anybody.get(f"/v1/transfers/{signed}"), 403, "address_invalid")


def test_it_can_do_no_more_than_its_token(
    api: Client, anybody: Client, files: str, stored: str
) -> None:
    made = presign(api, files, "upload")
    token = ApiToken.objects.get()
    token.scopes = ["sandboxes:read"]
    token.save()
    refusal(send(anybody, made), 403, "insufficient_scope")
    assert anybody.get(stored).status_code == 200
    token.allowed_networks = ["open"]
    token.save()
    refusal(anybody.get(stored), 403, "network_policy_blocked")
    revoke_token(token)
    refusal(anybody.get(stored), 403, "address_revoked")
    token.delete()
    refusal(anybody.get(stored), 403, "address_revoked")


def test_using_one_counts_as_a_call_of_its_token(
    api: Client, anybody: Client, stored: str, team: Team
) -> None:
    team.plan.api_requests_per_minute = 3
    team.plan.save()
    codes = [anybody.get(stored).status_code for _ in range(5)]
    assert codes[-1] == 429


def test_a_sandbox_that_is_not_running_has_no_transfers(
    api: Client, anybody: Client, files: str, stored: str
) -> None:
    Sandbox.objects.update(status=SandboxStatus.PAUSED)
    refusal(anybody.get(stored), 409, "sandbox_not_running")
    answer = post(api, f"{files}/presign-upload", {"path": PATH})
    refusal(answer, 409, "sandbox_not_running")


def test_a_file_that_is_not_there_is_a_404(api: Client, anybody: Client, files: str) -> None:
    made = presign(api, files, "download", "/workspace/absent")
    refusal(anybody.get(made["url"]), 404, "file_not_found")
    made = presign(api, files, "download", "/workspace")
    refusal(anybody.get(made["url"]), 409, "file_conflict")


def test_an_upload_says_its_length(api: Client, anybody: Client, files: str) -> None:
    made = presign(api, files, "upload")
    refusal(anybody.generic("PUT", made["url"]), 411, "length_required")


def test_asking_and_sending_are_in_the_audit_log_of_the_token(
    api: Client, anybody: Client, files: str
) -> None:
    made = presign(api, files, "upload")
    send(anybody, made)
    send(anybody, made)
    entries = AuditEntry.objects.filter(action__startswith="file.").order_by("pk")
    assert [(e.action, e.outcome, e.data, e.code) for e in entries] == [
        ("file.presign", "done", {"method": "PUT", "path": PATH}, ""),
        ("file.write", "done", {"path": PATH, "bytes": len(DATA)}, ""),
        ("file.write", "denied", {}, "address_used"),
    ]
    assert {entry.token for entry in entries} == {ApiToken.objects.get().prefix}
    assert made["url"].rpartition("/")[2] not in str([vars(entry) for entry in entries])


@pytest.mark.parametrize("error", [HostFault("It is broken."), ValueError("a bug")])
def test_an_address_is_in_no_log(
    api: Client,
    files: str,
    host: FakeHost,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: Exception,
) -> None:
    async def fail(*_: Any) -> int:
        raise error

    made = presign(api, files, "upload")
    monkeypatch.setattr(host, "write_stream", fail)
    anybody = Client(raise_request_exception=False)
    assert send(anybody, made).status_code == 500
    anybody.get(made["url"], headers={"Host": "elsewhere.example"})
    assert "/v1/transfers/..." in caplog.text
    assert Address.read(made["url"].rpartition("/")[2]).signed()[:20] not in caplog.text


def test_a_token_revoked_meanwhile_ends_a_transfer(
    api: Client,
    anybody: Client,
    files: str,
    host: FakeHost,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(transfers, "RECHECK_SECONDS", 0.0)
    host.write_file(sandbox_of(files), PATH, b"old")
    made = presign(api, files, "upload")
    write = host.write_stream

    def revoke() -> None:
        revoke_token(ApiToken.objects.get())

    async def write_after(*arguments: Any) -> int:
        await in_thread(revoke)
        return await write(*arguments)

    monkeypatch.setattr(host, "write_stream", write_after)
    refusal(send(anybody, made), 403, "address_revoked")
    assert host.read_path(sandbox_of(files), PATH).content == b"old"  # type: ignore[union-attr]


@pytest.fixture
def upload(api: Client, files: str) -> transfers.Transfer:
    """An upload that may begin."""
    address = presign(api, files, "upload")["url"].rpartition("/")[2]
    return async_to_sync(transfers.begin_upload)(address, None)


async def pieces_then(wait: asyncio.Event | None = None) -> AsyncGenerator[bytes]:
    """A body; with ``wait``, one whose last byte comes only then."""
    yield DATA[:-1]
    if wait is not None:
        await wait.wait()
    yield DATA[-1:]


def last_entry() -> dict[str, Any]:
    entry = AuditEntry.objects.filter(action="file.write").latest("pk")
    return {"outcome": entry.outcome, "code": entry.code, **entry.data}


@pytest.mark.parametrize("fails", [False, True])
def test_a_client_that_leaves_after_its_last_byte_has_sent_a_file(
    upload: transfers.Transfer, host: FakeHost, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    write, all_sent, may_end = host.write_stream, asyncio.Event(), asyncio.Event()

    async def slow(*arguments: Any) -> int:
        written = await write(*arguments)
        all_sent.set()
        await may_end.wait()
        if fails:
            raise NoSpace("There is no space left for it; delete something first.")
        return written

    monkeypatch.setattr(host, "write_stream", slow)

    async def leave() -> None:
        sending = asyncio.ensure_future(transfers.run_upload(upload, len(DATA), pieces_then()))
        await all_sent.wait()
        sending.cancel()
        await asyncio.sleep(0.01)
        may_end.set()
        with pytest.raises(asyncio.CancelledError):
            await sending

    async_to_sync(leave)()
    if fails:
        assert last_entry() == {"outcome": "denied", "code": "no_space"}
    else:
        assert last_entry() == {"outcome": "done", "code": "", "path": PATH, "bytes": len(DATA)}
    # What was written is not written twice.
    assert UsedUpload.objects.exists() != fails


def test_a_client_that_leaves_before_its_last_byte_has_not(
    upload: transfers.Transfer, host: FakeHost
) -> None:
    async def leave() -> None:
        never = pieces_then(asyncio.Event())
        sending = asyncio.ensure_future(transfers.run_upload(upload, len(DATA), never))
        await asyncio.sleep(0.01)
        sending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await sending

    async_to_sync(leave)()
    said = {"path": PATH, "ended": "the client went away"}
    assert last_entry() == {"outcome": "done", "code": "", **said}
    assert not UsedUpload.objects.exists()
    with pytest.raises(NotFound):
        host.read_path(upload.sandbox.pk, PATH)

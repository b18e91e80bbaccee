"""What people keep secret is in no log, no audit entry and no page that is not meant to show it."""

from __future__ import annotations

import io
import json
import logging
import re
from collections.abc import Iterator
from typing import Any

import pytest
from django.test import Client
from django_otp.oath import TOTP
from django_otp.plugins.otp_static.models import StaticDevice
from django_otp.plugins.otp_totp.models import TOTPDevice

from hostruntime.errors import HostFault, InvalidRequest
from hostruntime.host.logs import LineFormatter
from hostruntime.wire.commands import ExecResult
from orkestr_console.accounts.actor import READ
from orkestr_console.accounts.models import AuditEntry, Team, User
from sandboxes_app.models import Sandbox
from tests.api.asking import post
from tests.conftest import PASSWORD
from tests.fakes.fixtures import queued
from tests.fakes.host import FakeHost

VALUE = "hunter2-of-the-environment"
WRONG = "hunter3-typed-by-mistake"


@pytest.fixture
def log() -> Iterator[io.StringIO]:
    """The program's log at its most talkative (``ORKESTR_LOG_LEVEL=DEBUG``)."""
    stream = io.StringIO()
    handler, level = logging.StreamHandler(stream), logging.root.level
    handler.setFormatter(LineFormatter())
    logging.root.addHandler(handler)
    logging.root.setLevel(logging.DEBUG)
    yield stream
    logging.root.setLevel(level)
    logging.root.removeHandler(handler)


def recorded(log: io.StringIO) -> str:
    """Everything on record: the audit log, as its export shows it, and the program's own log."""
    rows = list(AuditEntry.objects.values())
    assert rows, "nothing is on record: no proof"
    return json.dumps(rows, default=str) + log.getvalue()


def text(answer: Any) -> str:
    return str(answer.content.decode())


@pytest.mark.parametrize("broken", [None, "down", "fault", "refusal"])
def test_variables_are_the_sandboxes_alone(
    api: Client,
    console: Client,
    host: FakeHost,
    log: io.StringIO,
    broken: str | None,
) -> None:
    """Whether all goes well or the host fails while it has them in its hands."""
    body = {"template": "debian-12", "env": {"KEY": VALUE}, "metadata": {"label": "mine"}}
    made = post(api, "/v1/sandboxes", body)
    box = Sandbox.objects.get()
    assert host.booted[box.pk].env == {"KEY": VALUE}, "the host never had it: no proof"
    command = f"echo {VALUE}"
    failures = {"fault": HostFault(f"`sh -c {command}`"), "refusal": InvalidRequest("no.")}
    host.answers[command] = failures.get(broken or "", ExecResult(0, None, b"", b"", 1))
    host.down = broken == "down"
    ran = post(api, f"/v1/sandboxes/{box.pk}/exec", {"command": command, "env": {"K2": VALUE}})
    assert (ran.status_code == 200) == (broken is None)
    shown = [made, ran, api.get(f"/v1/sandboxes/{box.pk}"), api.get("/v1/sandboxes")]
    shown += [console.get(path) for path in ("/sandboxes/", f"/sandboxes/{box.pk}/")]
    shown += [console.get("/team/audit/"), console.get("/team/audit/jsonl/")]
    refused = post(api, "/v1/sandboxes", {**body, "env": {"KEY": VALUE + "\0"}})
    assert refused.status_code == 400
    misnamed = post(api, "/v1/sandboxes", {**body, "env": {"9": VALUE}})
    assert misnamed.status_code == 400
    for answer in [*shown, refused, misnamed]:
        assert VALUE not in text(answer)
    assert VALUE not in recorded(log)
    assert VALUE not in repr(queued())


def test_passwords_and_codes_are_on_no_record(alice: User, log: io.StringIO) -> None:
    browser = Client()
    browser.post("/sign-in/", {"email": alice.email, "password": WRONG})
    browser.post("/sign-in/", {"email": alice.email, "password": PASSWORD})
    browser.post("/account/code/begin/")
    device = TOTPDevice.objects.get()
    code = f"{TOTP(device.bin_key).token():06d}"
    done = browser.post("/account/code/confirm/", {"code": code})
    shown = re.search(r'id="recovery-codes">([^<]+)<', done.content.decode())
    assert shown is not None
    codes = shown[1].split()
    assert len(codes) >= 5
    browser.post("/account/password/", {"current": WRONG, "password": WRONG})
    other = Client()
    other.post("/sign-in/", {"email": alice.email, "password": PASSWORD})
    other.post("/sign-in/code/", {"code": "987123"})
    for kind in (TOTPDevice, StaticDevice):
        kind.objects.update(throttling_failure_count=0, throttling_failure_timestamp=None)
    assert other.post("/sign-in/code/", {"code": codes[0]}).status_code == 302
    record = recorded(log)
    secrets = {PASSWORD, WRONG, code, "987123", codes[0], device.key}
    assert {secret for secret in secrets if secret in record} == set()
    pages = [text(browser.get(path)) for path in ("/account/", "/team/audit/")]
    assert {secret for secret in secrets for page in pages if secret in page} == set()


def test_links_and_tokens_are_on_no_record(console: Client, team: Team, log: io.StringIO) -> None:
    link = console.post("/team/people/", {"role": "member"}).context["link"]
    made = console.post("/team/tokens/", {"name": "ci", "scopes": READ, "days": "1"})
    key = made.context["text"]
    secret = link.rstrip("/").rpartition("/")[2]
    assert len(secret) > 40 and len(key) > 40
    who = {"name": "Eve", "email": "eve@example.org", "password": PASSWORD}
    Client().get(f"/join/{secret}x/")
    Client().post(f"/join/{secret}/", {**who, "email": "no address"})
    assert Client().post(f"/join/{secret}/", who).status_code == 302
    assert Client().get(f"/join/{secret}/").status_code == 404
    bearer = Client(headers={"Authorization": f"Bearer {key}"})
    assert bearer.get("/v1/templates").status_code == 200
    assert post(bearer, "/v1/templates", {}).status_code == 403
    Client(headers={"Authorization": f"Bearer {key}x"}).get("/v1/templates")
    record = recorded(log)
    assert "/join/***" in record, "the link was not logged at all: no proof"
    assert secret not in record
    assert key.rpartition("_")[2] not in record
    for path in ("/team/people/", "/team/tokens/", "/team/audit/", "/team/audit/csv/"):
        page = text(console.get(path))
        assert secret not in page and key not in page

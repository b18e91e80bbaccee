"""Schemathesis against the API: whatever it thinks of, no failure of ours and nothing undescribed.

It makes up requests from the document, valid ones and others (schemathesis.readthedocs.io). The
same ones every time, and few: what each call does is tested in files of their own.
"""

from __future__ import annotations

import json
import socket
from collections import defaultdict
from typing import Any

import pytest
import schemathesis
from django.core.handlers.wsgi import WSGIHandler
from django.test import Client
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.core.failures import FailureGroup
from schemathesis.specs.openapi import checks

from hostruntime.wire.commands import ExecFrame
from orkestr_console.http.describing import EVENTS, LINES
from tests.api.asking import post
from tests.api.describing import compare_items_of
from tests.fakes.fixtures import MakeTemplate
from tests.fakes.host import FakeHost
from tests.receiving import loopback_permitted as loopback_permitted

EXAMPLES = {GenerationMode.POSITIVE: 6, GenerationMode.NEGATIVE: 6}
SETTINGS = settings(
    derandomize=True,
    database=None,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
CHECKS = [
    not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_headers_conformance,
    checks.response_schema_conformance,
    checks.negative_data_rejection,
]
# Each file of a batch is refused for itself.
BATCH = "POST /v1/sandboxes/{sandbox_id}/files/batch"
# What ends something that the other calls are about comes last.
ENDINGS = ("delete_current_token", "terminate_sandbox", "delete_")

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.usefixtures("plans")]


@pytest.fixture(autouse=True)
def nobody_is_asked_for_addresses(
    loopback_permitted: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the hosts of made-up webhooks."""
    real = socket.getaddrinfo

    def resolve(host: str, *rest: Any, **options: Any) -> Any:
        if host != "127.0.0.1":
            raise OSError
        return real(host, *rest, **options)

    monkeypatch.setattr(socket, "getaddrinfo", resolve)


@pytest.fixture
def things(api: Client, make_template: MakeTemplate, host: FakeHost) -> dict[str, str]:
    """One of everything that an address can name."""
    template = make_template(name="tools")
    sandbox = post(api, "/v1/sandboxes", {"template": "debian-12"}).json()["id"]
    address = f"/v1/sandboxes/{sandbox}"
    hook = {"url": "http://127.0.0.1:9/"}
    file = {"path": "/workspace/a", "content": "QQ=="}
    assert post(api, f"{address}/files", file).status_code == 200
    signed = post(api, f"{address}/files/presign-download", {"path": "/workspace/a"}).json()
    return {
        "template_id": template.pk,
        "sandbox_id": sandbox,
        "snapshot_id": post(api, f"{address}/snapshots").json()["id"],
        "command_id": post(api, f"{address}/commands", {"command": "true"}).json()["id"],
        "webhook_id": post(api, "/v1/sandboxes/webhooks", hook).json()["id"],
        "address": signed["url"].rpartition("/")[2],
    }


def operations(schema: Any) -> list[Any]:
    # Without the one that probes a whole server.
    found = [each.ok() for each in schema.exclude(path="/readyz").get_all_operations()]

    def last(operation: Any) -> int:
        name = operation.definition.raw["operationId"]
        return next((n for n, each in enumerate(ENDINGS, 1) if name.startswith(each)), 0)

    return sorted(found, key=last)


def compare_items(case: Any, answer: Any) -> None:
    """Of a stream, which Schemathesis takes for one text."""
    media = answer.headers.get("content-type", [""])[0].partition(";")[0]
    if answer.status_code == 200 and media in {EVENTS, LINES}:
        lines = answer.text.splitlines()
        if media == EVENTS:
            lines = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
        compare_items_of(case.method, case.formatted_path, media, [json.loads(x) for x in lines])


@pytest.mark.parametrize("mode", list(EXAMPLES), ids=lambda mode: mode.value)
def test_whatever_is_sent_is_answered_as_described(
    key: str, things: dict[str, str], host: FakeHost, mode: GenerationMode
) -> None:
    frames = [ExecFrame("started", pid=1), ExecFrame("exited", code=0)]
    host.frames = defaultdict(lambda: list(frames))
    problems: list[str] = []

    def ask(case: Any) -> None:
        known = {name: things.get(name, value) for name, value in case.path_parameters.items()}
        case.path_parameters = known
        answer = case.call(headers={"Authorization": f"Bearer {key}"})
        unchecked = [checks.negative_data_rejection] if case.operation.label == BATCH else []
        case.validate_response(answer, checks=CHECKS, excluded_checks=unchecked)
        compare_items(case, answer)

    schema = schemathesis.openapi.from_wsgi("/v1/openapi.json", WSGIHandler())
    for operation in operations(schema):
        few = settings(SETTINGS, max_examples=EXAMPLES[mode])
        try:
            few(given(case=operation.as_strategy(generation_mode=mode))(ask))()
        except Unsatisfiable:
            # Nothing that is not valid can be sent.
            assert mode is GenerationMode.NEGATIVE
        except FailureGroup as group:
            problems += [
                f"{operation.label}: {group.message} {each!r}" for each in group.exceptions
            ]
    assert problems == [], "\n\n".join(problems)

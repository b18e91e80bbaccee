"""What a call, a page and the minutely task cost does not grow with the number of sandboxes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext

from hostruntime.wire.sandboxes import CreateSandbox, DailyUsage, ResourceUsage, UsageInfo
from orkestr_console.accounts.models import Plan, Team
from orkestr_console.accounts.usage import today
from sandboxes_app import tasks
from sandboxes_app.models import Sandbox
from tests.fakes.host import FakeHost

FEW, MANY = 10, 400
BODY = {"template": "debian-12", "network": "off"}


@pytest.fixture
def grow(api: Client, team: Team, host: FakeHost) -> Callable[[int], None]:
    """Has the team run so many sandboxes, each of which has used something since it was counted."""
    Plan.objects.update(max_concurrent_sandboxes=MANY * 2)
    made = api.post("/v1/sandboxes", BODY, "application/json").json()["id"]
    pattern = Sandbox.objects.get(pk=made)

    def run(number: int) -> None:
        rows: list[Sandbox] = []
        while Sandbox.objects.count() + len(rows) < number:
            pattern.pk = f"sbx_{len(host.booted):026}"
            rows.append(Sandbox(**{f.attname: getattr(pattern, f.attname) for f in FIELDS}))
            box = CreateSandbox(pattern.pk, image="debian-12", cpu=1, memory_mb=1024, network="off")
            host.create_sandbox(box)
        Sandbox.objects.bulk_create(rows)
        for sandbox, used in zip(host.booted, range(number, 0, -1), strict=False):
            day = DailyUsage(used + 0.5, used * 2.0, day=today())
            host.used[sandbox] = UsageInfo(
                sandbox, ended=False, before=ResourceUsage(), days=(day,)
            )

    return run


FIELDS = Sandbox._meta.concrete_fields


def costs(api: Client, owner: Client) -> Mapping[str, int]:
    """The statements of each call; each is made twice, and the second one counted."""
    newest = str(Sandbox.objects.latest("created_at").pk)

    def create_and_end() -> None:
        made = api.post("/v1/sandboxes", BODY, "application/json")
        assert made.status_code == 201, made.content
        assert api.delete(f"/v1/sandboxes/{made.json()['id']}").status_code == 204

    def get(client: Client, address: str) -> Callable[[], Any]:
        def call() -> None:
            assert client.get(address).status_code == 200

        return call

    calls: dict[str, Callable[[], Any]] = {
        "create and end": create_and_end,
        "get": get(api, f"/v1/sandboxes/{newest}"),
        "list": get(api, "/v1/sandboxes"),
        "limits": get(api, "/v1/sandboxes/limits"),
        "the page of all": get(owner, "/sandboxes/"),
        "the page of one": get(owner, f"/sandboxes/{newest}/"),
        "usage": get(owner, "/team/usage/"),
        "tidy": tasks.tidy,
    }
    return {name: statements(call) for name, call in calls.items()}


def statements(call: Callable[[], Any]) -> int:
    call()
    with CaptureQueriesContext(connection) as captured:
        call()
    return len(captured.captured_queries)


def test_no_call_page_or_task_takes_more_statements(
    grow: Callable[[int], None], api: Client, console: Client
) -> None:
    grow(FEW)
    few = costs(api, console)
    grow(MANY)
    assert costs(api, console) == few

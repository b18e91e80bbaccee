"""``GET /v1/sandboxes/{id}/host``, and what the front asks about a sandbox."""

from __future__ import annotations

import re
from typing import Any

import pytest
from asgiref.sync import async_to_sync
from django.test import Client

from orkestr_console.accounts.models import Team
from sandboxes_app import services
from sandboxes_app.models import Sandbox
from tests.fakes.host import FakeHost

URL = "/v1/sandboxes"
SUFFIX = re.compile(r"[0-9a-z]{26}\.localhost:\d+")


def create(api: Client, **wishes: object) -> Any:
    body = {"template": "debian-12", "network": "restricted", **wishes}
    return api.post(URL, body, content_type="application/json").json()


def test_each_port_has_a_host_of_its_own(api: Client, host: FakeHost) -> None:
    box = create(api)
    assert SUFFIX.fullmatch(box["preview_host_base"])
    assert box["preview_host_base"].partition(".")[0] == box["id"].removeprefix("sbx_").lower()
    for port in (1, 3000, 65535):
        told = api.get(f"{URL}/{box['id']}/host", {"port": port})
        assert told.json() == {"host": f"{port}-{box['preview_host_base']}"}


@pytest.mark.parametrize(
    "query",
    [
        *("", "port=", "port=0", "port=65536", "port=x", "port=٣", "port=-1"),
        *("port=000080123", f"port=000080{'1' * 4300}"),
    ],
)
def test_a_port_that_is_none(api: Client, host: FakeHost, query: str) -> None:
    told = api.get(f"{URL}/{create(api)['id']}/host?{query}")
    assert (told.status_code, list(told.json()["fields"])) == (400, ["port"])


def test_what_has_no_previews_says_why(api: Client, host: FakeHost, settings: Any) -> None:
    box = create(api, network="off")
    assert box["preview_host_base"] is None
    told = api.get(f"{URL}/{box['id']}/host?port=80")
    assert (told.status_code, told.json()["code"]) == (409, "preview_unavailable")
    box = create(api)
    api.delete(f"{URL}/{box['id']}")
    told = api.get(f"{URL}/{box['id']}/host?port=80")
    assert (told.status_code, told.json()["code"]) == (409, "sandbox_not_running")
    settings.PREVIEW_BASE = None
    box = create(api)
    assert box["preview_host_base"] is None
    told = api.get(f"{URL}/{box['id']}/host?port=80")
    assert (told.status_code, told.json()["code"]) == (400, "unsupported")


def test_only_who_may_use_a_sandbox_is_shown_its_token(
    api: Client, read_only_api: Client, host: FakeHost, team: Team
) -> None:
    box = create(api, preview_auth=True)
    assert len(box["preview_auth_token"]) == 64

    def shown(caller: Client) -> set[str | None]:
        listed = caller.get(URL).json()["sandboxes"]
        one = caller.get(f"{URL}/{box['id']}").json()
        return {each["preview_auth_token"] for each in (*listed, one)}

    assert shown(api) == {box["preview_auth_token"]}
    assert shown(read_only_api) == {None}
    for restriction in ({"allowed_networks": ["off"]}, {"allowed_templates": ["python-3.12"]}):
        anything = {"allowed_networks": None, "allowed_templates": None}
        team.tokens.update(**anything | restriction)
        assert shown(api) == {None}


def test_the_front_finds_what_is_there_with_one_statement(
    api: Client, host: FakeHost, django_assert_num_queries: Any
) -> None:
    find = async_to_sync(services.find_previewed)
    box, off, ended = create(api), create(api, network="off"), create(api)
    api.delete(f"{URL}/{ended['id']}")
    with django_assert_num_queries(1):
        found = find(box["id"])
    assert found is not None and found.pk == box["id"]
    assert find(off["id"]) is None and find(ended["id"]) is None
    assert find("sbx_01ARZ3NDEKTSV4RRFFQ69G5FAV") is None
    asked = {box["id"], ended["id"], "sbx_nobody"}
    assert services.ended_among(asked) == {ended["id"], "sbx_nobody"}


def test_a_visitor_wakes_it_once_and_as_the_system(api: Client, host: FakeHost) -> None:
    box = create(api, auto_resume=True, on_timeout="pause")
    api.post(f"{URL}/{box['id']}/pause", {}, content_type="application/json")
    row = Sandbox.objects.get(pk=box["id"])
    async_to_sync(services.wake_for_visitor)(row)
    assert Sandbox.objects.get(pk=box["id"]).status == "running"

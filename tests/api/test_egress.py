"""Allowlists over REST, what a build was refused, and what a sandbox asked for."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from django.test import Client

from hostruntime.wire.builds import BuildEvent as HostEvent
from hostruntime.wire.health import EgressHost
from orkestr_console.accounts.models import ApiToken, Plan, Team, TeamLimits
from templates_app.models import Template
from templates_app.services.record import record
from tests.api.asking import refusal
from tests.console.markup import tight
from tests.fakes.fixtures import run_queue
from tests.fakes.host import FakeHost

TEMPLATE = {"name": "tools", "base_template": "debian-12", "recipe": ["true"]}
SANDBOX = {"template": "debian-12", "network": "restricted"}


def made(api: Client, path: str, body: Mapping[str, object]) -> dict[str, object]:
    answer = api.post(path, body, content_type="application/json")
    assert answer.status_code == 201, answer.content
    said: dict[str, object] = answer.json()
    return said


def test_a_templates_list_is_normalised_and_reaches_the_host(api: Client, host: FakeHost) -> None:
    body = {**TEMPLATE, "allow_domains": ["@default", "*.Example.ORG.", "bücher.example"]}
    said = made(api, "/v1/templates", body)
    assert said["allow_domains"] == ["@default", "example.org", "xn--bcher-kva.example"]
    run_queue()
    assert Template.objects.get().status == "ready"
    request = host.built[Template.objects.get().image_id].request
    assert request.allow_domains == said["allow_domains"]


@pytest.mark.parametrize(
    "domains",
    [["10.0.0.1"], ["https://example.org"], ["a.*.example"], ["localhost"], [""], "x.example", [7]],
)
@pytest.mark.parametrize(("path", "body"), [("templates", TEMPLATE), ("sandboxes", SANDBOX)])
def test_garbage_is_refused(
    api: Client, host: FakeHost, path: str, body: dict[str, object], domains: object
) -> None:
    refusal(
        api.post(
            f"/v1/{path}", {**body, "allow_domains": domains}, content_type="application/json"
        ),
        400,
        "invalid_request",
    )


def test_a_list_is_for_the_restricted_network(api: Client, host: FakeHost) -> None:
    body = {**TEMPLATE, "network": "open", "allow_domains": ["example.org"]}
    answer = api.post("/v1/templates", body, content_type="application/json")
    assert "restricted" in refusal(answer, 400, "invalid_request")["detail"]


def test_a_list_is_the_plans_to_give(api: Client, team: Team, host: FakeHost) -> None:
    type(team.plan).objects.filter(pk=team.plan_id).update(custom_egress_allowlist=False)
    for path, body in (("templates", TEMPLATE), ("sandboxes", SANDBOX)):
        wanted = {**body, "allow_domains": ["example.org"]}
        answer = api.post(f"/v1/{path}", wanted, content_type="application/json")
        assert "default allowlist only" in refusal(answer, 403, "plan_limit")["detail"]


def test_a_token_for_other_networks_is_told_so_in_the_sdks_word(
    api: Client, host: FakeHost
) -> None:
    ApiToken.objects.update(allowed_networks=["off"])
    answer = api.post("/v1/sandboxes", SANDBOX, content_type="application/json")
    assert "only: off" in refusal(answer, 403, "network_policy_blocked")["detail"]


@pytest.mark.parametrize(
    "narrowed", [{"allowed_networks": ["off"]}, {"allowed_templates": ["python-3.12"]}]
)
def test_a_token_cannot_use_what_it_may_not_make(
    api: Client, host: FakeHost, narrowed: dict[str, list[str]]
) -> None:
    box = f"/v1/sandboxes/{made(api, '/v1/sandboxes', SANDBOX)['id']}"
    ApiToken.objects.update(**narrowed)
    for path, body in (
        ("exec", {"command": "true"}),
        ("exec", {"command": "true", "stream": True}),
        ("files", {"path": "/tmp/x", "content": ""}),
        ("timeout", {"timeout_seconds": 60}),
        ("pause", {}),
        ("resume", {}),
    ):
        answer = api.post(f"{box}/{path}", body, content_type="application/json")
        assert answer.status_code == 403, path
    assert api.get(f"{box}/files?path=/tmp").status_code == 403
    assert api.get(box).status_code == 200


def test_a_failed_build_names_what_could_be_allowed(
    api: Client, console: Client, host: FakeHost
) -> None:
    template = made(api, "/v1/templates", TEMPLATE)
    host.next_failure = {
        "code": "step_failed",
        "message": "Step 1 failed.",
        "refused": ["get.example.org"],
    }
    run_queue()
    said = api.get(f"/v1/templates/{template['id']}").json()
    assert (said["status"], said["refused_hosts"]) == ("failed", ["get.example.org"])
    page = tight(console.get(f"/templates/{template['id']}/"))
    assert "Allow get.example.org and rebuild" in page
    form = console.get(f"/templates/new/?from={template['id']}&allow=get.example.org")
    assert 'value="get.example.org"' in form.content.decode()


@pytest.mark.parametrize("open_too", [True, False])
@pytest.mark.parametrize("failed", [True, False])
def test_no_button_offers_what_the_plan_refuses(
    api: Client, console: Client, host: FakeHost, open_too: bool, failed: bool
) -> None:
    Plan.objects.update(custom_egress_allowlist=False, allow_open_network=open_too)
    refused = {"host": "get.example.org", "port": 443, "reason": "not_listed"}
    host.refused = [{**refused, "can_be_listed": True}]
    template = made(api, "/v1/templates", TEMPLATE)
    run_queue()
    if failed:
        Template.objects.update(status="failed", error_message="Step 1 failed.")
    page = tight(console.get(f"/templates/{template['id']}/"))
    assert "get.example.org and rebuild</a>" not in page
    assert "has the default allowlist only" in page
    assert "larger plan" in page
    link = f"/templates/new/?from={template['id']}&amp;network=open"
    assert (link in page) is open_too
    if open_too:
        form = console.get(link.replace("&amp;", "&")).content.decode()
        assert 'value="open" checked' in form


def test_what_the_teams_admins_do_not_allow_is_theirs_to_be_asked_for(
    api: Client, console: Client, host: FakeHost, team: Team
) -> None:
    Plan.objects.update(custom_egress_allowlist=False, allow_open_network=True)
    TeamLimits.objects.create(team=team, allowed_networks=["off", "restricted"])
    refused = {"host": "get.example.org", "port": 443, "reason": "not_listed"}
    host.refused = [{**refused, "can_be_listed": True}]
    template = made(api, "/v1/templates", TEMPLATE)
    run_queue()
    page = tight(console.get(f"/templates/{template['id']}/"))
    assert "to allow the network &#x27;open&#x27;" in page
    assert "&amp;network=open" not in page


def test_a_build_that_went_on_without_a_host_says_so_everywhere(
    api: Client, console: Client, host: FakeHost
) -> None:
    host.refused = [
        {"host": "get.example.org", "port": 443, "reason": "not_listed", "can_be_listed": True},
        {"host": "192.0.2.7", "port": 80, "reason": "not_https", "can_be_listed": False},
        {
            "host": "keys.example.org",
            "port": 0,
            "reason": "not_listed",
            "can_be_listed": True,
            "direct": True,
        },
    ]
    template = made(api, "/v1/templates", TEMPLATE)
    run_queue()
    said = api.get(f"/v1/templates/{template['id']}").json()
    listable = ["get.example.org", "keys.example.org"]
    assert (said["status"], said["refused_hosts"]) == ("ready", listable)
    everything = ["get.example.org", "192.0.2.7", "keys.example.org"]
    assert said["steps"][0]["refused_hosts"] == everything
    (warning,) = said["steps"][0]["warnings"]
    assert "asked DNS for keys.example.org, past the proxy" in warning
    assert "$HTTPS_PROXY" in warning
    (line,) = api.get("/v1/templates").json()["templates"]
    assert line["refused_hosts"] == listable
    page = tight(console.get(f"/templates/{template['id']}/"))
    assert f"<code>{', '.join(everything)}</code> but continued" in page
    assert "Allow get.example.org, keys.example.org and rebuild" in page
    assert "asked DNS for keys.example.org, past the proxy" in page


def test_a_reused_step_is_still_without_what_it_was_refused(api: Client, host: FakeHost) -> None:
    host.by_itself = False
    template = made(api, "/v1/templates", TEMPLATE)
    image = Template.objects.get(pk=template["id"])
    refused = {"host": "get.example.org", "port": 443, "reason": "not_listed"}
    event = HostEvent(
        1,
        1.0,
        "step_cached",
        {"step": 1, "saved_at": 1.0, "refused": [{**refused, "can_be_listed": True}]},
    )
    Template.objects.update(driver="here")
    record(image, "here", event)
    said = api.get(f"/v1/templates/{template['id']}").json()
    assert said["refused_hosts"] == said["steps"][0]["refused_hosts"] == ["get.example.org"]


def test_what_a_sandbox_asked_for_is_listed(
    api: Client, console: Client, other_api: Client, host: FakeHost
) -> None:
    box = made(api, "/v1/sandboxes", SANDBOX)["id"]
    assert api.get(f"/v1/sandboxes/{box}/egress").json() == {"hosts": []}
    host.egress[str(box)] = [
        EgressHost("evil.example", 443, 0, 3, "not_listed", "evil.example is no", 1.0, 0, 0),
        EgressHost("gone.example", 443, 1, 0, "no_address", "no address", 2.0, 10, 39, 1),
        EgressHost("fine.example", 443, 2, 0, "allowed", "fine", 2.0, 1200, 34_000),
        EgressHost("past.example", 0, 0, 0, "past_proxy", "set", 2.0, 0, 0, 7, direct=True),
    ]
    (first, gone, second, past) = api.get(f"/v1/sandboxes/{box}/egress").json()["hosts"]
    assert (first["host"], first["refused"], second["received_bytes"]) == ("evil.example", 3, 34000)
    assert (gone["unreached"], gone["reason"], second["unreached"]) == (1, "no_address", 0)
    assert (first["direct"], past["direct"], past["unreached"]) == (False, True, 7)
    page = tight(console.get(f"/sandboxes/{box}/egress/"))
    row = page[page.index("past.example") :].partition("</tr>")[0]
    assert "direct</span>" in row
    assert ("example:0" in row, "<td>7</td>" in row) == (False, True)
    assert '</i>Not reached</span><small class="help">no address</small>' in page
    assert page.index("evil.example is no") < page.index("fine.example")
    refusal(other_api.get(f"/v1/sandboxes/{box}/egress"), 404, "not_found")


def test_a_host_that_is_away_is_said_in_the_panel(
    api: Client, console: Client, host: FakeHost
) -> None:
    box = made(api, "/v1/sandboxes", SANDBOX)["id"]
    host.down = True
    assert "responding" in console.get(f"/sandboxes/{box}/egress/").content.decode()

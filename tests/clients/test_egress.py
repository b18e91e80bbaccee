"""The restricted network as builds and SDK callers meet it, on a live installation."""

from __future__ import annotations

import httpx
import pytest
from orkestr import BackgroundCommand
from orkestr.errors import NetworkPolicyError, OrkestrError

from tests.clients.making import Sandboxes, Templates
from tests.stack import Stack, wait_for

# Refused by name before anybody resolves it: no packet leaves for it.
UNLISTED = "nowhere.invalid"
FETCH = f"python3 -c \"import urllib.request as u; u.urlopen('https://{UNLISTED}/x')\""


def test_a_build_that_is_refused_a_host_says_which_and_how_to_allow_it(
    templates: Templates,
) -> None:
    failed = templates.finished(templates.create("python-3.12-bare", "true", FETCH))
    assert failed["status"] == "failed"
    message = failed["error_message"]
    assert f"the network policy refused: {UNLISTED}:443" in message
    assert "allow_domains" in message
    assert failed["refused_hosts"] == [UNLISTED]
    assert failed["error_code"] == "network_policy_blocked"


def test_a_key_server_that_gpg_asks_dns_for_is_named(templates: Templates) -> None:
    """GnuPG's dirmngr is told of the proxy, and asks DNS first all the same."""
    step = (
        "apt-get update && apt-get install -y --no-install-recommends gnupg dirmngr && "
        f"gpg --keyserver hkps://keys.{UNLISTED} --recv-keys "
        "0xF23C5A6CF475977595C89F51BA6932366A755776"
    )
    failed = templates.finished(templates.create("debian-12", step))
    message = failed["error_message"]
    assert f"the network policy refused: keys.{UNLISTED} (by DNS)" in message
    assert 'network "open"' in message
    assert failed["error_code"] == "network_policy_blocked"
    assert failed["refused_hosts"] == [f"keys.{UNLISTED}"]


def test_an_allowed_host_is_no_longer_refused(templates: Templates) -> None:
    failed = templates.finished(
        templates.create("python-3.12-bare", FETCH, allow_domains=["@default", UNLISTED])
    )
    assert failed["status"] == "failed"
    assert "network policy refused" not in failed["error_message"]
    said = f"{UNLISTED} is allowed, but could not be reached: its name has no address"
    assert said in failed["error_message"]
    assert failed["error_code"] == "step_failed"


def test_a_sandbox_shows_what_it_asked_for(stack: Stack, sandboxes: Sandboxes) -> None:
    sandbox = sandboxes.boot("python-3.12", network="restricted")
    done = sandbox.exec(FETCH)
    assert done.exit_code == 1
    assert "403" in done.stderr
    # Beside the exit status, in what every client shows: only if it failed, and in its own time.
    assert "network_policy_blocked: While this command ran" in done.stderr
    assert f"{UNLISTED}:443" in done.stderr
    begun = sandbox.exec(FETCH, background=True)
    assert isinstance(begun, BackgroundCommand)
    assert begun.wait(poll_seconds=0.1, timeout=60) == 1
    assert f"refused its sandbox {UNLISTED}:443." in begun.logs().content
    assert sandbox.exec(f"{FETCH} || true").stderr.count("policy_blocked") == 0
    fetched = sandbox.exec("cd /tmp && pip download --no-deps --quiet six", timeout_seconds=120)
    assert fetched.exit_code == 0, fetched.stderr
    with stack.client() as api:

        def hosts() -> list[dict[str, object]]:
            found: list[dict[str, object]] = api.get(f"/v1/sandboxes/{sandbox.id}/egress").json()[
                "hosts"
            ]
            return found

        wait_for(lambda: any(int(str(use["received_bytes"])) > 1000 for use in hosts()), 10)
        first, *others = hosts()
        network = api.get(f"/v1/sandboxes/{sandbox.id}/metrics").json()["network"]
    assert network["received_bytes"] > 1000
    assert network["sent_bytes"] > 0
    assert (first["host"], first["reason"]) == (UNLISTED, "not_listed")
    assert UNLISTED in str(first["message"])
    assert all(use["allowed"] for use in others)
    direct = "exec 3<>/dev/tcp/198.51.100.1/443"
    tried = "".join(part.data for part in sandbox.exec_stream(f"bash -c '{direct}'"))
    assert "198.51.100.1:443 (past the proxy)" in tried
    assert UNLISTED not in tried
    assert "198.51.100.1" not in sandbox.exec("false").stderr


def test_a_list_of_ones_own_replaces_the_default_one(sandboxes: Sandboxes) -> None:
    sandbox = sandboxes.boot(
        "python-3.12", network="restricted", allow_domains=["registry.example"]
    )
    done = sandbox.exec("cd /tmp && pip download --no-deps --retries 0 six", timeout_seconds=60)
    assert done.exit_code != 0


def test_garbage_in_a_list_is_refused_with_its_reason(stack: Stack, sandboxes: Sandboxes) -> None:
    with pytest.raises(OrkestrError, match="is an address"):
        sandboxes.boot("debian-12", network="restricted", allow_domains=["10.0.0.1"])


def test_a_token_for_less_network_raises_the_sdks_own_error(stack: Stack) -> None:
    from orkestr import OrkestrClient, Sandbox

    key = stack.manage("mint_token", "--team=demo", "--scope=*", "--network=off").stdout.strip()
    client = OrkestrClient(base_url=stack.url, api_key=key)
    with pytest.raises(NetworkPolicyError):
        Sandbox.create(template="debian-12", network="restricted", client=client)
    assert httpx.get(f"{stack.url}/healthz", trust_env=False).is_success

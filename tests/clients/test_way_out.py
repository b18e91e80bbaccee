"""Recipes that leave the environment of their step behind, and programs that never look at it."""

from __future__ import annotations

import pytest

from tests.clients.making import Sandboxes, Templates

PERSON = "useradd -m -s /bin/bash app"
SUDO = "apt-get update && apt-get install -y --no-install-recommends sudo"
# Refused by name before anybody resolves it.
UNLISTED = "get.nowhere.invalid"
COMPANY = (
    "mkdir -p /opt/ca && cd /opt/ca && openssl req -x509 -newkey rsa:2048 -nodes -keyout k.pem "
    "-out corp.crt -days 30 -subj /CN=localhost -addext subjectAltName=DNS:localhost && "
    "cp corp.crt /usr/local/share/ca-certificates/ && update-ca-certificates"
)
ASK = (
    "cd /opt/ca; openssl s_server -quiet -accept 8443 -cert corp.crt -key k.pem -www "
    ">/dev/null 2>&1 & until ss -ltn 2>/dev/null | grep -q 8443 || "
    "grep -q :20FB /proc/net/tcp*; do sleep 0.1; done; "
    "python3 -c 'import requests; print(requests.get(\"https://localhost:8443/\").status_code)'"
)
JAVA = """\
import java.net.*;
public class T {
  public static void main(String[] a) throws Exception {
    HttpURLConnection c = (HttpURLConnection) new URL(a[0]).openConnection();
    System.out.println(c.getResponseCode());
  }
}
"""


@pytest.mark.parametrize(
    ("base", "recipe", "check"),
    [
        (
            "python-3.12",
            (f"{SUDO} && {PERSON}", "sudo -u app -H pip install --user humanize"),
            "su - app -c 'python3 -c \"import humanize; print(humanize.intcomma(1000))\"'",
        ),
        (
            "python-3.12",
            (PERSON, "su - app -c 'pip install --user humanize'"),
            "su - app -c 'python3 -c \"import humanize; print(humanize.intcomma(1000))\"'",
        ),
        (
            "node-22",
            (
                "npm install -g @yarnpkg/cli-dist",
                "mkdir /root/a && cd /root/a && echo 'nodeLinker: node-modules' >.yarnrc.yml && "
                "yarn init -y && yarn add left-pad",
            ),
            'cd /root/a && node -p \'require("left-pad")("1,000", 5)\'',
        ),
    ],
    ids=["sudo", "su", "yarn"],
)
def test_what_is_installed_by_another_way_is_there(
    templates: Templates,
    sandboxes: Sandboxes,
    base: str,
    recipe: tuple[str, ...],
    check: str,
) -> None:
    sandbox = sandboxes.boot(templates.ready(base, *recipe))
    done = sandbox.exec(check)
    assert done.stdout.strip() == "1,000", done.stderr


def test_a_jvm_goes_through_the_proxy_and_trusts_what_the_host_does(templates: Templates) -> None:
    ask = "$(npm config get registry)"
    recipe = (
        "apt-get update && apt-get install -y --no-install-recommends openjdk-17-jdk-headless",
        f"cat >/root/T.java <<'END'\n{JAVA}END",
        f"test 200 = $(java /root/T.java {ask})",
    )
    templates.ready("node-22", *recipe)


def test_a_template_that_did_without_a_host_is_ready_and_says_which(templates: Templates) -> None:
    made = templates.create("debian-12", f"curl -fsSL https://{UNLISTED}/install.sh | bash")
    record = templates.finished(made)
    assert (record["status"], record["refused_hosts"]) == ("ready", [UNLISTED])
    assert record["steps"][0]["refused_hosts"] == [UNLISTED]


def test_a_step_that_went_without_an_allowed_host_is_warned_of(templates: Templates) -> None:
    step = f"curl -fsSL https://{UNLISTED}/install.sh | bash"
    made = templates.create("debian-12", step, allow_domains=[UNLISTED])
    record = templates.finished(made)
    assert (record["status"], record["refused_hosts"]) == ("ready", [])
    (warning,) = record["steps"][0]["warnings"]
    assert f"{UNLISTED} is allowed, but could not be reached: its name has no address" in warning


def test_a_companys_authority_is_trusted_in_its_sandboxes(
    templates: Templates, sandboxes: Sandboxes
) -> None:
    install = "apt-get update && apt-get install -y --no-install-recommends openssl"
    made = templates.ready("python-3.12", install, COMPANY, f"test 200 = $({ASK})")
    for network in ("off", "restricted"):
        done = sandboxes.boot(made, network=network).exec(ASK)
        assert done.stdout.strip() == "200", done.stderr

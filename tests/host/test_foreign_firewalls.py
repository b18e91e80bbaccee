"""Others' rules in the way, loaded for real into a network namespace of the test's own."""

from __future__ import annotations

import json
import subprocess

import pytest

from hostruntime.network.firewall import PROXY_PORT
from hostruntime.network.foreign_firewalls import Barrier, parse_legacy_iptables, parse_nftables

pytestmark = pytest.mark.host

# As Docker's and iptables-nft's rules are seen by nft.
DOCKER = """
table ip filter {
  chain DOCKER-USER { counter return; }
  chain FORWARD { type filter hook forward priority filter; policy drop;
    counter jump DOCKER-USER; oifname "docker0" ct state established,related counter accept; }
}
"""
UFW = """
table ip filter {
  chain ufw-before-input { ct state established,related accept; }
  chain ufw-before-forward { ct state established,related accept; }
  chain INPUT { type filter hook input priority filter; policy drop; jump ufw-before-input; }
  chain FORWARD { type filter hook forward priority filter; policy drop; jump ufw-before-forward; }
}
"""
FIREWALLD = """
table inet firewalld {
  chain filter_FORWARD { type filter hook forward priority filter + 10; policy accept;
    ct state { established, related } accept; iifname "lo" accept;
    reject with icmpx admin-prohibited; }
}
"""
PLAIN = """
table inet mine {
  chain coming { type filter hook input priority filter; policy drop; tcp dport 22 accept; }
  chain passing { type filter hook forward priority filter; policy drop; }
  chain leaving { type filter hook output priority filter; policy drop; }
}
"""
HARMLESS = """
table inet mine {
  chain passing { type filter hook forward priority filter; policy accept;
    iifname "eth7" drop; ct state invalid counter drop; counter; }
}
table inet orkestr_7 {
  chain passing { type filter hook forward priority filter; policy drop; }
}
"""


def in_a_namespace(*commands: str) -> list[Barrier]:
    """What is found after commands of nft's have been run, nobody else's rules around."""
    script = "".join(f"nft -f - <<'END' || exit 1\n{command}\nEND\n" for command in commands)
    argv = ["unshare", "--net", "sh", "-c", f"{script}nft -j list ruleset"]
    done = subprocess.run(argv, capture_output=True, check=True)
    return parse_nftables(json.loads(done.stdout))


def test_a_machine_without_rules_has_nothing_in_the_way() -> None:
    assert in_a_namespace("") == []


def test_rules_that_refuse_something_else_are_not_in_the_way() -> None:
    assert in_a_namespace(HARMLESS) == []


def test_docker_is_told_by_its_chain() -> None:
    (found,) = in_a_namespace(DOCKER)
    assert "ip filter FORWARD (Docker) drops forwarded packets" in found.problem
    assert found.remedy.startswith(
        "iptables -I DOCKER-USER -i ork+ -j ACCEPT && iptables -I DOCKER-USER -o ork+ -j ACCEPT"
    )


def test_what_docker_was_told_counts() -> None:
    """The rules of the remedy, as iptables-nft would write them."""
    into = 'insert rule ip filter DOCKER-USER iifname "ork*" counter accept'
    out = 'insert rule ip filter DOCKER-USER oifname "ork*" counter accept'
    assert len(in_a_namespace(DOCKER, into)) == 1
    assert in_a_namespace(DOCKER, into, out) == []


def test_ufw_is_told_by_its_chains() -> None:
    coming, passing = in_a_namespace(UFW)
    assert "(ufw) drops incoming packets" in coming.problem
    assert f"`-A ufw-before-input -i ork+ -p tcp --dport {PROXY_PORT} -j ACCEPT`" in coming.remedy
    assert "`-A ufw-before-forward -o ork+ -j ACCEPT`" in passing.remedy
    assert passing.remedy.endswith("ufw reload")


def test_a_last_rule_that_refuses_is_as_good_as_a_policy() -> None:
    (found,) = in_a_namespace(FIREWALLD)
    assert "(firewalld)" in found.problem
    assert "firewall-cmd" in found.remedy


def test_a_rule_set_of_ones_own_gets_the_commands_that_let_sandboxes_through_it() -> None:
    coming, passing = in_a_namespace(PLAIN)
    assert "inet mine coming drops incoming packets" in coming.problem
    assert "network restricted" in coming.problem
    assert "network open" in passing.problem
    # Each remedy does what it says: nft takes it, and then nothing is in the way.
    commands = [part.split("'")[1] for one in (coming, passing) for part in one.remedy.split("&&")]
    assert len(commands) == 3
    assert in_a_namespace(PLAIN, *commands) == []


LEGACY = """\
-P INPUT ACCEPT
-P FORWARD DROP
-P OUTPUT ACCEPT
-N DOCKER-USER
-A FORWARD -j DOCKER-USER
-A FORWARD -o docker0 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A DOCKER-USER -j RETURN
"""


def test_legacy_rules_are_read_too() -> None:
    (found,) = parse_legacy_iptables(LEGACY)
    assert found.problem.startswith("legacy iptables chain ip filter FORWARD (Docker)")
    assert found.remedy.startswith("iptables-legacy -I DOCKER-USER -i ork+ -j ACCEPT")
    told = LEGACY + "-A DOCKER-USER -i ork+ -j ACCEPT\n-A DOCKER-USER -o ork+ -j ACCEPT\n"
    assert parse_legacy_iptables(told) == []


def test_a_legacy_chain_may_refuse_by_its_last_rule() -> None:
    rules = "-P INPUT ACCEPT\n-P FORWARD ACCEPT\n-P OUTPUT ACCEPT\n"
    assert parse_legacy_iptables(rules + "-A INPUT -s 192.0.2.1/32 -j DROP\n") == []
    (found,) = parse_legacy_iptables(
        rules + "-A INPUT -j REJECT --reject-with icmp-port-unreachable\n"
    )
    assert f"-I INPUT -i ork+ -p tcp --dport {PROXY_PORT} -j ACCEPT" in found.remedy

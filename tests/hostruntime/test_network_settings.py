"""What an operator sets about the network, and what follows for nft and Squid, as text."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

import pytest

from hostruntime.network.firewall import FirewallPlan, proxy_mark, ruleset
from hostruntime.network.policy import PolicyError, deny_list, is_denied
from hostruntime.network.settings import NetworkSettings, host_resolvers
from hostruntime.network.squid_config import SquidPlan, squid_config


def test_an_operators_settings_are_read_from_the_environment() -> None:
    settings = NetworkSettings.from_environment(
        {
            "ORKESTR_EGRESS_DENY": "198.51.100.0/24, 2001:db8::/32",
            "ORKESTR_EGRESS_PERMIT": "10.9.8.7/32",
            "ORKESTR_DNS": "192.0.2.53,192.0.2.54",
        }
    )
    assert settings.resolvers == ("192.0.2.53", "192.0.2.54")
    assert IPv4Network("198.51.100.0/24") in settings.denied
    assert not is_denied(IPv4Address("10.9.8.7"), settings.denied)
    assert is_denied(IPv4Address("10.9.8.8"), settings.denied)
    assert settings.permitted == (IPv4Network("10.9.8.7/32"),)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ORKESTR_EGRESS_DENY", "10.0.0.1/8"),
        ("ORKESTR_EGRESS_PERMIT", "mirror.example"),
        ("ORKESTR_DNS", "resolver.example"),
    ],
)
def test_a_malformed_setting_is_named(name: str, value: str) -> None:
    with pytest.raises(PolicyError) as caught:
        NetworkSettings.from_environment({name: value})
    assert value in str(caught.value)


def test_resolvers_are_the_hosts_or_those_behind_its_stub(tmp_path: Path) -> None:
    stub, upstream = tmp_path / "resolv.conf", tmp_path / "upstream"
    stub.write_text("# stub\nnameserver 127.0.0.53\noptions edns0\n")
    upstream.write_text(
        "nameserver 198.51.100.1\nnameserver fe80::1%eth0\nnameserver\nnameserver 2001:db8::1\n"
    )
    assert host_resolvers([stub, upstream]) == ("198.51.100.1", "2001:db8::1")
    assert host_resolvers([stub, tmp_path / "missing"]) == ()
    stub.write_text("nameserver 203.0.113.1\nnameserver ::1\nnameserver junk\n")
    assert host_resolvers([stub, upstream]) == ("203.0.113.1",)


def test_two_instances_share_no_table_mark_or_interface() -> None:
    texts = [ruleset(plan(index)) for index in (1, 11)]
    assert 'iifname "ork1-*"' in texts[0]
    assert 'iifname "ork11-*"' in texts[1]
    assert "orkestr_11" not in texts[0]
    assert proxy_mark(1) != proxy_mark(11)


def plan(index: int) -> FirewallPlan:
    return FirewallPlan(
        table=f"orkestr_{index}",
        prefix=f"ork{index}-",
        proxy=IPv4Address(f"10.{200 + index}.0.1"),
        proxy_port=3128,
        restricted=IPv4Network(f"10.{200 + index}.64.0/18"),
        open=IPv4Network(f"10.{200 + index}.128.0/18"),
        resolvers=("192.0.2.53", "2001:db8::53"),
        denied=deny_list(),
        permitted=(),
        mark=proxy_mark(index),
    )


def test_the_proxy_asks_before_every_other_rule_and_ends_in_a_refusal(tmp_path: Path) -> None:
    text = squid_config(
        SquidPlan(
            address="10.201.0.1",
            port=3128,
            directory=tmp_path,
            log_directory=tmp_path / "log",
            helper_command="/helper",
            denied=deny_list(),
            local_addresses=("203.0.113.9",),
            resolvers=("192.0.2.53",),
            mark=0x10,
        )
    )
    rules = [line for line in text.splitlines() if line.startswith("http_access")]
    assert rules == [
        "http_access deny manager",
        # Its own second port, and its own question whether that one answers.
        "http_access allow peeked ourselves",
        "http_access deny peeked",
        "http_access allow ourselves probe",
        "http_access deny too_many",
        "http_access deny !may_reach",
        "http_access deny denied_address !may_use_address",
        "http_access deny !resolves",
        "http_access allow is_recorded",
        "http_access deny all",
    ]
    assert "acl denied_address dst 10.0.0.0/8" in text
    assert "acl denied_address dst 203.0.113.9" in text
    assert "tcp_outgoing_mark 0x10 peeked" in text
    tunnels = [line for line in text.splitlines() if line.startswith("ssl_bump")]
    assert tunnels == [
        "ssl_bump peek at_request",
        "ssl_bump splice hello_matches",
        "ssl_bump terminate all",
    ]

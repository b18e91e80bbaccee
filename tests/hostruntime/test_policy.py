"""What a container may reach, decided without touching the network."""

from __future__ import annotations

import ipaddress
import random
import string

import pytest

from hostruntime.network.policy import (
    MAX_DOMAINS,
    NO_POLICY,
    Policy,
    PolicyError,
    canonical_host,
    decide,
    deny_list,
    is_address_literal,
    is_denied,
    matches,
    normalise_domain,
    normalise_domains,
    parse_domain_list,
    parse_networks,
)

LISTED = ("example.com", "mirror.example.org", "xn--bcher-kva.example")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("example.com", "example.com"),
        ("EXAMPLE.Com", "example.com"),
        ("example.com.", "example.com"),
        (" example.com\n", "example.com"),
        ("*.example.com", "example.com"),
        ("*.EXAMPLE.com.", "example.com"),
        ("bücher.example", "xn--bcher-kva.example"),
        ("BÜCHER.example", "xn--bcher-kva.example"),
        ("*.bücher.example", "xn--bcher-kva.example"),
        ("xn--bcher-kva.example", "xn--bcher-kva.example"),
        ("straße.example", "xn--strae-oqa.example"),
        ("例え.テスト", "xn--r8jz45g.xn--zckzah"),
        ("bücher。example", "xn--bcher-kva.example"),
        ("my_bucket.storage.example", "my_bucket.storage.example"),
        ("a.b.c.d.example", "a.b.c.d.example"),
        ("1.example", "1.example"),
    ],
)
def test_an_allowlist_entry_has_one_form(text: str, expected: str) -> None:
    assert normalise_domain(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        ".",
        "..",
        "*",
        "*.",
        "*.*",
        "*.com",
        "com",
        "localhost",
        "a.*.example",
        "*a.example",
        "http://example.com",
        "https://example.com/",
        "example.com/path",
        "example.com:443",
        "user@example.com",
        "exa mple.com",
        "example..com",
        ".example.com",
        "-a.example",
        "a-.example",
        "a" * 64 + ".example",
        "a." * 127 + "example",
        "1.2.3.4",
        "10.0.0.0/8",
        "0x7f.1",
        "2130706433",
        "127.1",
        "[::1]",
        "::1",
        "fe80::1%eth0",
        "%65xample.com",
        "example.com\x00",
        "example.com\r\nacl all",
        "\N{PARTY POPPER}.example",
        "xn--\N{LATIN SMALL LETTER U WITH DIAERESIS}.example",
        "a\u200d.example",
    ],
)
def test_garbage_is_refused_in_a_sentence_that_shows_it(text: str) -> None:
    with pytest.raises(PolicyError) as caught:
        normalise_domain(text)
    assert repr(text[:80]) in str(caught.value)


def test_no_random_text_gets_past_the_form_of_a_host_name() -> None:
    chance = random.Random(7)
    letters = string.printable + "äß例\u00ad\u200b。"
    for _ in range(3000):
        text = "".join(chance.choices(letters, k=chance.randint(0, 24)))
        try:
            domain = normalise_domain(text)
        except PolicyError:
            continue
        assert canonical_host(domain) == domain
        assert normalise_domain(domain) == domain


def test_doubles_collapse_and_a_list_has_an_end() -> None:
    assert normalise_domains(["B.example", "a.example", "b.example."]) == ("b.example", "a.example")
    assert len(normalise_domains(f"h{i}.example" for i in range(MAX_DOMAINS))) == MAX_DOMAINS
    with pytest.raises(PolicyError, match=str(MAX_DOMAINS)):
        normalise_domains(f"h{i}.example" for i in range(MAX_DOMAINS + 1))


def test_a_data_file_may_have_comments() -> None:
    text = "# head\n\nexample.com  # why\n  *.Example.org\n"
    assert parse_domain_list(text) == ("example.com", "example.org")
    with pytest.raises(PolicyError):
        parse_domain_list("https://example.com\n")


@pytest.mark.parametrize(
    ("host", "covered"),
    [
        ("example.com", True),
        ("EXAMPLE.com.", True),
        ("a.example.com", True),
        ("a.b.example.com", True),
        ("evil-example.com", False),
        ("example.com.evil.test", False),
        ("example.org", False),
        ("mirror.example.org", True),
        ("files.mirror.example.org", True),
        ("notmirror.example.org", False),
        ("com", False),
        ("www.xn--bcher-kva.example", True),
    ],
)
def test_a_domain_covers_itself_and_its_subdomains(host: str, covered: bool) -> None:
    canonical = canonical_host(host)
    assert canonical is not None
    assert (matches(canonical, LISTED) is not None) is covered


@pytest.mark.parametrize(
    ("method", "host", "port", "reason"),
    [
        ("CONNECT", "example.com", 443, "allowed"),
        ("CONNECT", "a.EXAMPLE.com.", 443, "allowed"),
        ("GET", "example.com", 80, "not_https"),
        ("GET", "example.com", 443, "not_https"),
        ("POST", "example.com", 80, "not_https"),
        ("CONNECT", "example.com", 80, "bad_port"),
        ("CONNECT", "example.com", 22, "bad_port"),
        ("CONNECT", "example.com", 8443, "bad_port"),
        ("CONNECT", "other.example", 443, "not_listed"),
        ("CONNECT", "1.2.3.4", 443, "address_literal"),
        ("CONNECT", "[2001:db8::1]", 443, "address_literal"),
        ("CONNECT", "2130706433", 443, "address_literal"),
        ("CONNECT", "0x7f.0.0.1", 443, "address_literal"),
        ("CONNECT", "exa%6dple.com", 443, "bad_host"),
        ("CONNECT", "bücher.example", 443, "bad_host"),
        ("CONNECT", "example..com", 443, "bad_host"),
        ("CONNECT", "-", 443, "bad_host"),
        ("CONNECT", "", 443, "bad_host"),
    ],
)
def test_a_request_is_judged(method: str, host: str, port: int, reason: str) -> None:
    verdict = decide(LISTED, method, host, port)
    assert verdict.reason == reason
    assert verdict.allowed is (reason == "allowed")
    assert verdict.message


def test_without_a_policy_nothing_is_allowed() -> None:
    assert decide(None, "CONNECT", "example.com", 443).message == NO_POLICY
    assert not decide((), "CONNECT", "example.com", 443).allowed


@pytest.mark.parametrize(
    "text", ["1.2.3.4", "[::1]", "::ffff:1.2.3.4", "127.1", "0x7f000001", "1."]
)
def test_address_literals_are_known_in_every_notation(text: str) -> None:
    assert is_address_literal(text)
    assert canonical_host(text) is None


@pytest.mark.parametrize(
    ("address", "denied"),
    [
        ("10.1.2.3", True),
        ("172.16.0.1", True),
        ("172.32.0.1", False),
        ("192.168.1.1", True),
        ("127.0.0.1", True),
        ("0.0.0.0", True),
        ("100.100.100.200", True),
        ("169.254.169.254", True),
        ("168.63.129.16", True),
        ("192.0.0.192", True),
        ("224.0.0.1", True),
        ("255.255.255.255", True),
        ("192.0.2.10", False),
        ("198.51.100.10", False),
        ("203.0.113.10", False),
        ("8.8.8.8", False),
        ("::1", True),
        ("::", True),
        ("fe80::1", True),
        ("fd00:ec2::254", True),
        ("ff02::1", True),
        ("::ffff:10.0.0.1", True),
        ("::ffff:8.8.8.8", False),
        ("64:ff9b::a00:1", True),
        ("64:ff9b::808:808", False),
        ("2002:a00:1::1", True),
        ("2606:4700::1111", False),
        ("2001:db8::1", False),
    ],
)
def test_the_deny_list(address: str, denied: bool) -> None:
    assert is_denied(ipaddress.ip_address(address), deny_list()) is denied


def test_an_operator_adds_to_the_deny_list_and_cuts_holes_into_it() -> None:
    denied = deny_list(extra=["198.51.100.0/24"], permit=["10.1.2.3/32", "fd12::/64"])
    verdicts = {
        text: is_denied(ipaddress.ip_address(text), denied)
        for text in ("198.51.100.7", "10.1.2.3", "10.1.2.2", "10.1.2.4", "fd12::9", "fd12:1::9")
    }
    assert verdicts == {
        "198.51.100.7": True,
        "10.1.2.3": False,
        "10.1.2.2": True,
        "10.1.2.4": True,
        "fd12::9": False,
        "fd12:1::9": True,
    }
    assert deny_list(permit=["0.0.0.0/0", "::/0"]) == ()
    for text in ("10.0.0.1/8", "nonsense", "10.0.0.0/33", ""):
        with pytest.raises(PolicyError, match="is not a network"):
            parse_networks([text])


def test_a_policy_is_one_of_three_modes_and_lists_belong_to_restricted() -> None:
    assert Policy.parse("restricted", ["*.Example.com"]).allow_domains == ("example.com",)
    assert Policy.parse("restricted").allow_domains is None
    assert Policy.parse("restricted", []).allow_domains == ()
    for mode in ("", "on", "OFF", "bridge"):
        with pytest.raises(PolicyError, match="off, restricted or open"):
            Policy.parse(mode)
    for mode in ("off", "open"):
        with pytest.raises(PolicyError, match="restricted only"):
            Policy.parse(mode, ["example.com"])

"""What the resolver that knows no name reads and says, byte by byte."""

from __future__ import annotations

import random
import struct

import pytest

from hostruntime.network.direct import judge_query, queried_host
from hostruntime.network.stub_resolver import nxdomain, parse_question

LISTED = frozenset({"allowed.test"})


def query(
    name: str, *, flags: int = 0x0100, questions: int = 1, kind: int = 1, more: bytes = b""
) -> bytes:
    labels = b"".join(bytes((len(label),)) + label.encode() for label in name.split(".") if label)
    head = struct.pack("!HHHHHH", 0xBEEF, flags, questions, 0, 0, 1 if more else 0)
    return head + labels + b"\0" + struct.pack("!HH", kind, 1) + more


EDNS = b"\0" + struct.pack("!HHIH", 41, 1232, 0, 0)


@pytest.mark.parametrize("more", [b"", EDNS])
def test_a_question_is_read_and_answered_that_there_is_no_such_name(more: bytes) -> None:
    asked = query("Keys.example.org", kind=28, more=more)
    question = parse_question(asked)
    assert question is not None
    assert (question.name, question.kind) == ("Keys.example.org", 28)
    said = nxdomain(asked, question)
    number, flags, *counts = struct.unpack_from("!HHHHHH", said)
    assert (number, flags & 0x000F, flags >> 15, flags & 0x0100) == (0xBEEF, 3, 1, 0x0100)
    assert counts == [1, 0, 0, 0]
    assert said[12:] == query("Keys.example.org", kind=28)[12:]


@pytest.mark.parametrize(
    "datagram",
    [
        b"",
        b"\0" * 11,
        query("a.test", flags=0x8100),
        query("a.test", flags=0x2800),
        query("a.test", questions=2),
        query("a.test", questions=0),
        query("a.test")[:-1],
        query("a.test")[:-5],
        query("x" * 64 + ".test"),
        query(".".join(["x" * 60] * 5)),
        struct.pack("!HHHHHH", 1, 0x0100, 1, 0, 0, 0) + b"\xc0\x0c\0\1\0\1",
        struct.pack("!HHHHHH", 1, 0x0100, 1, 0, 0, 0) + b"\x04b\xfccx\0\0\1\0\1",
    ],
)
def test_what_is_no_question_is_none(datagram: bytes) -> None:
    assert parse_question(datagram) is None


def test_garbage_is_survived() -> None:
    chance = random.Random(53)
    for _ in range(5000):
        datagram = bytearray(query("some.name.test", more=EDNS))
        for _ in range(chance.randrange(1, 8)):
            datagram[chance.randrange(len(datagram))] = chance.randrange(256)
        short = bytes(datagram[: chance.randrange(len(datagram) + 1)])
        if (question := parse_question(short)) is not None:
            assert len(question.name) <= 330
            assert len(nxdomain(short, question)) <= len(short)
            queried_host(question.name)


@pytest.mark.parametrize(
    ("name", "host"),
    [
        ("Example.ORG", "example.org"),
        ("_hkps._tcp.keys.example.org", "keys.example.org"),
        ("db", None),
        ("", None),
        ("localhost", None),
        ("app.localhost", None),
        ("printer.local", None),
        ("1.0.0.127.in-addr.arpa", None),
        ("a b.example", None),
        ("10.0.0.1", None),
        ("<b>.example", None),
        ("../../etc/passwd.test", None),
    ],
)
def test_only_hosts_of_the_outside_are_recorded(name: str, host: str | None) -> None:
    assert queried_host(name) == host


def test_the_verdict_says_what_the_program_needs() -> None:
    unlisted = judge_query("restricted", LISTED, "keys.example")
    assert (unlisted.allowed, unlisted.reason) == (False, "not_listed")
    for part in ("keys.example", "$HTTPS_PROXY", "allow_domains", "network open"):
        assert part in unlisted.message
    allowed = judge_query("restricted", LISTED, "www.allowed.test")
    assert (allowed.allowed, allowed.reason) == (True, "past_proxy")
    assert "$HTTPS_PROXY" in allowed.message
    assert "allow_domains" not in allowed.message
    off = judge_query("off", frozenset(), "allowed.test")
    assert (off.allowed, off.reason) == (False, "network_off")

"""The proxy's helper, asked directly: whatever is missing or malformed is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hostruntime.network import egress_helper
from hostruntime.network.egress_helper import BURST, MAX_LOG_BYTES, RateLimiter, main


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    for name in ("entries", "decisions"):
        (tmp_path / name).mkdir()
    (tmp_path / "defaults.json").write_text(json.dumps({"domains": ["default.example"]}))
    give(tmp_path, "10.0.0.1", "box", ["own.example"])
    give(tmp_path, "10.0.0.2", "plain", None)
    return tmp_path


def answer(directory: Path, line: str, rates: RateLimiter | None = None) -> str:
    return egress_helper.answer(directory, line, rates or RateLimiter())


def give(directory: Path, address: str, owner: str, domains: list[str] | None) -> None:
    entry = {"owner": owner, "domains": domains}
    (directory / "entries" / f"{address}.json").write_text(json.dumps(entry))


def recorded(directory: Path, owner: str) -> list[dict[str, object]]:
    path = directory / "decisions" / f"{owner}.ndjson"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_a_listed_host_is_let_through_and_recorded_once(directory: Path) -> None:
    assert answer(directory, "7 10.0.0.1 CONNECT own.example 443 decide") == "7 OK tag=box"
    assert recorded(directory, "box") == []
    assert answer(directory, "8 10.0.0.1 CONNECT own.example 443 allow") == "8 OK tag=box"
    (line,) = recorded(directory, "box")
    assert (line["host"], line["port"], line["verdict"]) == ("own.example", 443, "allowed")


def test_an_own_list_replaces_the_default_one(directory: Path) -> None:
    asked = {
        address: answer(directory, f"0 {address} CONNECT default.example 443 decide")[:4]
        for address in ("10.0.0.1", "10.0.0.2")
    }
    assert asked == {"10.0.0.1": "0 ER", "10.0.0.2": "0 OK"}


def test_a_refusal_is_recorded_with_its_reason(directory: Path) -> None:
    reply = answer(directory, "3 10.0.0.1 CONNECT other.example 443 decide")
    assert reply.startswith('3 ERR message="other.example is not on its allowlist')
    (line,) = recorded(directory, "box")
    assert (line["owner"], line["reason"]) == ("box", "not_listed")


def test_a_listed_name_with_a_denied_address_is_refused(directory: Path) -> None:
    reply = answer(directory, "3 10.0.0.1 CONNECT own.example 443 address")
    assert "resolves to an address" in reply
    assert recorded(directory, "box")[0]["reason"] == "denied_address"


@pytest.mark.parametrize(
    "question",
    [
        "",
        "10.0.0.1",
        "10.0.0.1 CONNECT own.example",
        "10.0.0.1 CONNECT own.example x decide",
        "10.0.0.1 CONNECT own.example -1 decide",
        "10.0.0.9 CONNECT own.example 443 decide",
        "::1 CONNECT own.example 443 decide",
        "../entries/10.0.0.1 CONNECT own.example 443 decide",
        "10.0.0.1 CONNECT own.example%00 443 decide",
        "10.0.0.1 CONNECT own.example%0a 443 decide",
        "10.0.0.1 CONNECT - 443 decide",
    ],
)
def test_what_cannot_be_understood_is_refused(directory: Path, question: str) -> None:
    reply = answer(directory, f"5 {question}")
    assert reply.startswith('5 ERR message="')
    assert reply.isprintable()


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"owner": "box"}', "null", '{"owner":1,"domains":7}']
)
def test_a_damaged_entry_is_no_entry(directory: Path, text: str) -> None:
    (directory / "entries" / "10.0.0.1.json").write_text(text)
    assert " ERR " in answer(directory, "0 10.0.0.1 CONNECT own.example 443 decide")


def test_without_the_default_list_nobody_relying_on_it_gets_out(directory: Path) -> None:
    (directory / "defaults.json").unlink()
    assert " ERR " in answer(directory, "0 10.0.0.2 CONNECT default.example 443 decide")


def test_a_quote_in_a_host_cannot_end_the_message(directory: Path) -> None:
    reply = answer(directory, "0 10.0.0.1 CONNECT a%22%20x=1%0d%0aOK.example 443 decide")
    assert reply.count("\n") == 0
    assert '\\" x=1??ok' in reply.lower()


def test_a_log_has_an_end_and_decisions_hold_past_it(directory: Path) -> None:
    log = directory / "decisions" / "box.ndjson"
    log.write_bytes(b"x" * MAX_LOG_BYTES)
    assert answer(directory, "0 10.0.0.1 CONNECT own.example 443 allow") == "0 OK tag=box"
    assert log.stat().st_size == MAX_LOG_BYTES


def test_a_log_that_cannot_be_written_changes_no_decision(
    directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (directory / "decisions").rmdir()
    assert answer(directory, "0 10.0.0.1 CONNECT own.example 443 allow") == "0 OK tag=box"
    assert "could not be recorded" in capsys.readouterr().err


def test_it_answers_line_by_line_until_the_end(
    directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = directory / "asked"
    asked.write_bytes(b"0 10.0.0.1 CONNECT own.example 443 decide\n1 \xff\xfe\n")
    with asked.open() as lines:
        monkeypatch.setattr("sys.stdin", lines)
        main([str(directory)])
    replies = capsys.readouterr().out.splitlines()
    assert [reply[:4] for reply in replies] == ["0 OK", "1 ER"]


def test_the_default_list_can_be_added_to(directory: Path) -> None:
    give(directory, "10.0.0.3", "more", ["@default", "own.example"])
    for host, reply in (("own", "0 OK"), ("default", "0 OK"), ("other", "0 ER")):
        assert answer(directory, f"0 10.0.0.3 CONNECT {host}.example 443 decide")[:4] == reply


@pytest.mark.parametrize(
    ("named", "reason"),
    [
        ("own.example", None),
        ("OWN.example", None),
        ("own.example.", None),
        ("other.example", "server_name_differs"),
        ("own.example.evil", "server_name_differs"),
        ("-", "no_server_name"),
        ("%0a", "server_name_differs"),
    ],
)
def test_a_tunnel_must_name_the_host_it_is_for(
    directory: Path, named: str, reason: str | None
) -> None:
    reply = answer(directory, f"0 10.0.0.1 CONNECT own.example 443 {named} hello")
    assert reply.startswith("0 OK" if reason is None else "0 ERR")
    assert [line["reason"] for line in recorded(directory, "box")] == [reason] * bool(reason)


def test_a_name_in_the_tunnel_does_not_open_one(directory: Path) -> None:
    assert " ERR " in answer(directory, "0 10.0.0.1 CONNECT x.example 443 x.example hello")


def test_one_container_in_a_hurry_waits_and_others_do_not(directory: Path) -> None:
    rates, ask = RateLimiter(), "CONNECT own.example 443 decide"
    give(directory, "10.0.0.4", "calm", ["own.example"])
    replies = [answer(directory, f"0 10.0.0.1 {ask}", rates) for _ in range(int(BURST) + 1000)]
    assert replies[0].startswith("0 OK")
    assert "connections a second" in replies[-1]
    assert answer(directory, f"0 10.0.0.4 {ask}", rates).startswith("0 OK")

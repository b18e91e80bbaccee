"""The parts of `make test-vm` that need no machine: apt's sources, pip's settings, the tables."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.verify import parts
from tests.vm.checklist import Checklist, Row, needed
from tests.vm.releases import RELEASES
from tests.vm.report import Result, markdown, table
from tests.vm.sources import SourcesError, deb822, debian_sources, one_line, pip_settings
from tests.vm.trial import complaints, denials

STANZAS = """\
Types: deb
# a comment with bookworm in it
URIs: http://mirror.example/debian
Suites: bookworm bookworm-updates
Components: main
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg

Types: deb
URIs: https://vendor.example/apt
Suites: nodistro
Components: main

Types: deb
URIs: http://mirror.example/debian-security
Suites: bookworm-security
Components: main
"""


def test_debians_stanzas_are_kept_and_renamed_others_are_not() -> None:
    text = deb822(STANZAS, "bookworm", "trixie")
    assert "Suites: trixie trixie-updates\n" in text
    assert "Suites: trixie-security\n" in text
    assert "Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg" in text
    assert "vendor.example" not in text
    assert deb822("Types: deb\nSuites: nodistro\n", "bookworm", "trixie") == ""


def test_a_mirrors_name_is_not_taken_for_a_suite() -> None:
    stanza = "Types: deb\nURIs: http://bookworm.example/bookworm\nSuites: bookworm\n"
    assert "http://bookworm.example/bookworm\n" in deb822(stanza, "bookworm", "trixie")


def test_one_line_sources_are_renamed_with_and_without_options() -> None:
    text = (
        "# deb http://mirror.example/debian bookworm main\n"
        "deb http://mirror.example/debian bookworm main contrib\n"
        "deb [signed-by=/k.gpg arch=amd64] http://mirror.example/security bookworm-security main\n"
        "deb https://vendor.example/apt vendor-bookworm main\n"
        "deb-src http://mirror.example/debian bookworm main\n"
    )
    assert one_line(text, "bookworm", "trixie") == (
        "deb http://mirror.example/debian trixie main contrib\n"
        "deb [signed-by=/k.gpg arch=amd64] http://mirror.example/security trixie-security main\n"
    )


def test_a_machine_without_sources_says_so(tmp_path: Path) -> None:
    files = [tmp_path / "debian.sources", tmp_path / "vendor.list", tmp_path / "debian.sources.bak"]
    files[0].write_text(STANZAS)
    files[1].write_text("deb https://vendor.example/apt vendor main\n")
    files[2].write_text(STANZAS)
    found = debian_sources(files, "bookworm", "trixie")
    assert [name for name, _ in found] == ["debian.sources"]
    with pytest.raises(SourcesError, match="no source of bookworm"):
        debian_sources(files[1:], "bookworm", "trixie")


def test_pip_keeps_its_web_indexes_and_loses_this_machines_directories() -> None:
    text = (
        "[global]\ncert = /etc/ssl/certs/ca-certificates.crt\nfind-links = /opt/wheels\n"
        "extra-index-url = file:///opt/simple\n  https://index.example/simple\ntimeout = 60\n"
    )
    kept = pip_settings(text)
    assert "cert = /etc/ssl/certs/ca-certificates.crt" in kept
    assert "extra-index-url = https://index.example/simple" in kept
    assert "timeout = 60" in kept
    assert "/opt/" not in kept
    assert "find-links" not in kept


def test_a_check_that_raises_has_failed_and_the_next_one_runs() -> None:
    said: list[str] = []
    checks = Checklist(said.append)

    def fails() -> int:
        raise AssertionError("it was\nnot so")

    assert checks.check("first", fails) is None
    assert checks.check("second", lambda: 7) == 7
    lacking: int | None = None
    assert checks.check("third", lambda: needed(lacking, "no sandbox")) is None
    assert [row.held for row in checks.rows] == [False, True, False]
    assert "it was" in checks.rows[0].why
    assert checks.rows[2].why == "not tried: no sandbox"
    assert any("FAILED" in line and "not so" in line for line in said)


def test_the_tables_tell_what_held_and_what_did_not() -> None:
    facts = {"kernel": "6.12", "LXC": "6.0.4", "PostgreSQL": "17", "Python": "3.13.5"}
    good = Result(
        "Debian 13", "2026-11-29", {**facts, "commit": "abc"}, [Row("a", held=True, seconds=1.0)]
    )
    rows = [Row("a", held=True, seconds=1.0), Row("b", held=False, seconds=2.0, why="why not")]
    bad = Result("Debian 12", "2026-11-29", {}, rows)
    assert good.held
    assert not bad.held
    assert not Result("Debian 12", "2026-11-29", {}).held
    lines = markdown([good, bad]).splitlines()
    assert lines[0].startswith("| date | release | kernel |")
    assert lines[2] == (
        "| 2026-11-29 | Debian 13 | 6.12 | 6.0.4 | 17 | 3.13.5 | abc | all 1 checks |"
    )
    assert lines[3].endswith("| 1 of 2 checks; not: b |")
    assert "why not" in table(bad)


def test_the_kernel_log_is_read_for_denials_and_complaints() -> None:
    denied = (
        '[  9.1] audit: type=1400 audit(1.1:2): apparmor="DENIED" operation="mount" '
        'profile="orkestr-0" name="/mnt/" comm="python3"'
    )
    log = [
        '[  8.0] audit: type=1400 apparmor="STATUS" operation="profile_load" name="orkestr-0"',
        denied,
        "[ 10.0] WARNING: CPU: 1 PID: 7 at fs/x.c:1 x+0x1/0x2",
        "[ 11.0] loop0: detected capacity change",
    ]
    assert denials(log) == {denied}
    assert complaints(log) == [log[2]]


def test_make_test_leaves_the_machines_alone() -> None:
    arguments = [path for paths in parts().values() for path in paths]
    assert "tests/runner" in arguments
    assert "tests/vm" not in arguments
    assert not list(Path(__file__).parents[1].joinpath("vm").glob("test_*"))
    assert set(RELEASES) == {"trixie", "bookworm"}

"""The doctor's verdicts, on machines that lack something."""

from __future__ import annotations

import os
import shutil
import socket
from pathlib import Path
from typing import NamedTuple

import pytest

from hostruntime.registries import combine
from orkestr_console.runner import doctor
from orkestr_console.runner.layout import Layout, layout_from


class Usage(NamedTuple):
    """What shutil.disk_usage answers."""

    total: int
    used: int
    free: int


class Uname(NamedTuple):
    """The part of os.uname() that is asked."""

    release: str


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return layout_from({"ORKESTR_VAR": str(tmp_path)})


@pytest.mark.parametrize(
    ("release", "verdict"),
    [("6.1.0-18-amd64", "ok"), ("5.19.0", "ok"), ("5.15.0-91-generic", "fail"), ("4.19", "fail")],
)
def test_an_old_kernel_fails(
    layout: Layout, monkeypatch: pytest.MonkeyPatch, release: str, verdict: str
) -> None:
    monkeypatch.setattr(os, "uname", lambda: Uname(release))
    assert doctor.check_kernel(layout).verdict == verdict


@pytest.mark.parametrize(
    ("gibibytes", "verdict"), [(100, "ok"), (4, "ok"), (3, "warn"), (0.5, "fail")]
)
def test_a_full_disk_warns_and_then_fails(
    layout: Layout, monkeypatch: pytest.MonkeyPatch, gibibytes: float, verdict: str
) -> None:
    free = int(gibibytes * doctor.GIB)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: Usage(0, 0, free))
    finding = doctor.check_disk(layout)
    assert finding.verdict == verdict
    assert bool(finding.remedy) == (verdict != "ok")


def test_a_taken_port_names_the_next_one() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        finding = doctor.check_port(layout_from({"PORT": str(port), "ORKESTR_VAR": "/nowhere"}))
    assert finding.verdict == "fail"
    assert f"PORT={port + 1}" in finding.remedy


def test_missing_programs_are_named_by_their_package(
    layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = shutil.which
    absent = {"squid", "nft"}
    monkeypatch.setattr(
        shutil, "which", lambda name, path=None: None if name in absent else found(name, path=path)
    )
    finding = doctor.check_programs(layout)
    assert finding.verdict == "fail"
    assert "apt-get install nftables squid-openssl" in finding.remedy


def test_a_proxy_that_cannot_run_fails(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "proxy_obstacles", lambda: ["Squid cannot peek."])
    finding = doctor.check_proxy(layout)
    assert (finding.verdict, finding.seen) == ("fail", "Squid cannot peek.")
    assert "squid-openssl" in finding.remedy


def test_registries_that_nobody_can_name_are_a_warning(
    layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing = combine(None, None, [])
    monkeypatch.setattr(doctor, "host_registries", lambda _: nothing)
    finding = doctor.check_registries(layout)
    assert finding.verdict == "warn"
    assert "apt names no Debian mirror" in finding.seen


def test_a_state_directory_on_memory_is_refused(layout: Layout, tmp_path: Path) -> None:
    on_tmpfs = layout_from({"ORKESTR_STATE_DIR": "/dev/shm/host"})
    finding = doctor.check_overlay(on_tmpfs)
    assert finding.verdict == "fail"
    assert "ORKESTR_STATE_DIR" in finding.remedy


def test_every_check_answers_here(layout: Layout) -> None:
    findings = list(doctor.examine(layout))
    assert len({finding.name for finding in findings}) == len(findings)
    assert all(finding.seen for finding in findings)
    assert all(finding.remedy for finding in findings if finding.verdict != "ok")

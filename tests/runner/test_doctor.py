"""The doctor's verdicts, on machines that lack something."""

from __future__ import annotations

import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest

from hostruntime.container import apparmor, delegation
from hostruntime.container.trials import TRIALS
from hostruntime.host.disk_space import DiskSpace
from hostruntime.host.installation import InstallationMismatch, InstallationStore
from hostruntime.host.paths import StatePaths
from hostruntime.host.run import Completed, run
from hostruntime.image.quarantine import Quarantine
from hostruntime.image.trash import Trash
from hostruntime.network.registries import combine
from hostruntime.wire.reconciliation import Claim
from orkestr_console.runner.doctor import (
    cgroups,
    examine,
    keeping,
    kernel,
    machine,
    network,
    software,
)
from orkestr_console.runner.doctor.finding import Finding
from orkestr_console.runner.layout import TREE, Layout, layout_from


class Uname(NamedTuple):
    """The part of os.uname() that is asked."""

    release: str


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return layout_from({"ORKESTR_VAR": str(tmp_path)})


def on_its_own(source: str, *prefix: str) -> str:
    """Run Python in a process of its own, behind e.g. unshare(1); what it prints."""
    code = textwrap.dedent(source)
    argv = [*prefix, sys.executable, "-c", code]
    done = subprocess.run(argv, cwd=TREE, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


# The kernel -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("release", "verdict"),
    [("6.1.0-18-amd64", "ok"), ("5.19.0", "ok"), ("5.15.0-91-generic", "fail"), ("4.19", "fail")],
)
def test_an_old_kernel_fails(
    layout: Layout, monkeypatch: pytest.MonkeyPatch, release: str, verdict: str
) -> None:
    monkeypatch.setattr(os, "uname", lambda: Uname(release))
    assert kernel.check_kernel(layout).verdict == verdict


@pytest.mark.parametrize(("name", "verdict"), [("aarch64", "ok"), ("i686", "fail")])
def test_an_architecture_without_a_filter_fails(
    layout: Layout, monkeypatch: pytest.MonkeyPatch, name: str, verdict: str
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: name)
    assert kernel.check_architecture(layout).verdict == verdict


def test_modules_that_an_upgrade_took_away_want_a_reboot(layout: Layout, tmp_path: Path) -> None:
    modules = tmp_path / "modules"
    assert kernel.check_modules(layout, modules).verdict == "ok"
    (modules / "6.99.0-later").mkdir(parents=True)
    finding = kernel.check_modules(layout, modules)
    assert finding.verdict == "warn"
    assert "6.99.0-later" in finding.detail
    assert finding.remedy.startswith("reboot")
    (modules / os.uname().release).mkdir()
    assert kernel.check_modules(layout, modules).verdict == "ok"


def test_each_trial_has_words_for_both_ends() -> None:
    assert set(TRIALS) == set(kernel._SUCCESSES) == set(kernel._REMEDIES)


def test_what_was_tried_in_vain_fails_with_the_kernels_word(
    layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On procfs nothing can be id-mapped, nor a file without a name be made."""
    monkeypatch.setattr(kernel, "existing_ancestor", lambda _path: Path("/proc"))
    found = {finding.name: finding for finding in kernel.trial_findings(layout)}
    assert found["openat2"].verdict == "ok"
    for name in ("id-mapped mounts", "loop devices", "overlay"):
        assert found[name].verdict == "fail"
        assert "Errno" in found[name].detail
    assert "ORKESTR_STATE_DIR" in found["id-mapped mounts"].remedy


def sysctls(tmp_path: Path, most: int, settings: Mapping[str, str] | None = None) -> Path:
    values = {f"user/max_{kind}_namespaces": str(most) for kind in kernel.NAMESPACES}
    values |= {f"kernel/{name}": value for name, value in (settings or {}).items()}
    for name, value in values.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"{value}\n")
    return tmp_path


@pytest.mark.parametrize(("most", "verdict"), [(20_000, "ok"), (100, "warn"), (0, "fail")])
def test_a_machine_may_allow_few_namespaces_or_none(
    layout: Layout, tmp_path: Path, most: int, verdict: str
) -> None:
    finding = kernel.check_namespaces(layout, sysctls(tmp_path, most))
    assert finding.verdict == verdict
    assert ("sysctl -w user.max_" in finding.remedy) == (verdict != "ok")


def test_what_restricts_other_users_is_said_not_to_matter(layout: Layout, tmp_path: Path) -> None:
    restricted = {"apparmor_restrict_unprivileged_userns": "1", "unprivileged_userns_clone": "0"}
    finding = kernel.check_namespaces(layout, sysctls(tmp_path, 20_000, restricted))
    assert finding.verdict == "ok"
    for name in restricted:
        assert f"kernel.{name}" in finding.detail
    assert "does not matter" in finding.detail
    lax = {"apparmor_restrict_unprivileged_userns": "0", "unprivileged_userns_clone": "1"}
    assert "matter" not in kernel.check_namespaces(layout, sysctls(tmp_path, 20_000, lax)).detail


def limits_of(root: Path, **values: int) -> Path:
    for name in ("kernel", "fs"):
        (root / name).mkdir()
    for name, value in values.items():
        (root / name.replace("__", "/")).write_text(f"{value}\n")
    return root


def test_low_limits_of_the_machine_are_named(
    layout: Layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {"kernel__threads-max": 7000, "fs__nr_open": 1_048_576}
    sysctls = limits_of(tmp_path, kernel__pid_max=4096, **values)
    finding = kernel.check_limits(layout, sysctls)
    assert finding.verdict == "ok"
    assert finding.detail == "kernel.pid_max is 4096; the next start raises what is too low"
    monkeypatch.setattr(kernel, "is_read_only", lambda _: True)
    finding = kernel.check_limits(layout, sysctls)
    assert (finding.verdict, finding.detail) == ("warn", "kernel.pid_max is 4096")
    assert finding.remedy == "sysctl -w kernel.pid_max=4194304"


def test_what_is_not_raised_for_us_is_said_in_any_case(layout: Layout, tmp_path: Path) -> None:
    values = {"kernel__threads-max": 7000, "fs__nr_open": 1024}
    sysctls = limits_of(tmp_path, kernel__pid_max=4_194_304, **values)
    finding = kernel.check_limits(layout, sysctls)
    assert (finding.verdict, finding.detail) == ("warn", "fs.nr_open is 1024")
    (sysctls / "fs/nr_open").write_text("1048576\n")
    finding = kernel.check_limits(layout, sysctls)
    assert finding.verdict == "ok"
    assert finding.detail == "all sandboxes together run up to 5250 processes and threads"


# Control groups ---------------------------------------------------------------------------


def groups(root: Path, **files: str) -> Path:
    root.mkdir()
    for name, text in files.items():
        (root / name.replace("_", ".")).write_text(text)
    return root


def test_a_hierarchy_without_a_controller_names_it(layout: Layout, tmp_path: Path) -> None:
    whole = groups(tmp_path / "whole", cgroup_controllers="cpuset cpu io memory pids\n")
    assert cgroups.check_cgroups(layout, whole).verdict == "ok"
    lacking = groups(tmp_path / "lacking", cgroup_controllers="cpuset cpu io pids\n")
    finding = cgroups.check_cgroups(layout, lacking)
    assert (finding.verdict, finding.detail) == ("fail", "v2 without memory")
    assert "cgroup_disable" in finding.remedy


def test_v1_alone_and_half_a_hybrid_fail(layout: Layout, tmp_path: Path) -> None:
    root = tmp_path / "groups"
    (root / "memory").mkdir(parents=True)
    assert cgroups.check_cgroups(layout, root).verdict == "fail"
    (root / "unified").mkdir()
    (root / "unified/cgroup.procs").touch()
    finding = cgroups.check_cgroups(layout, root)
    assert (finding.verdict, finding.detail) == ("fail", "hybrid, without v1's cpu, pids")
    (root / "cpu").mkdir()
    (root / "pids").mkdir()
    assert cgroups.check_cgroups(layout, root).verdict == "ok"


@pytest.fixture
def systemd_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What looks like systemd's machine with v2 alone, to the check and to the agent's module."""
    root = groups(tmp_path / "v2", cgroup_controllers="cpu memory pids\n")
    monkeypatch.setattr(delegation, "cgroup_layout", lambda: SimpleNamespace(delegated=True))
    return root


def test_delegation_is_asked_for_only_where_systemd_has_the_tree(
    layout: Layout, tmp_path: Path
) -> None:
    nowhere = tmp_path / "nowhere"
    assert cgroups.check_delegation(layout, systemd=nowhere).verdict == "ok"
    assert cgroups.check_delegation(layout, systemd=tmp_path, root=tmp_path).verdict == "ok"


def test_a_systemd_that_does_not_answer_fails(tmp_path: Path) -> None:
    """Nobody listens where systemd-run(1) asks, and yet it looks like systemd's machine."""
    root = groups(tmp_path / "v2", cgroup_controllers="cpu memory pids\n")
    printed = on_its_own(
        f"""
        import subprocess
        from pathlib import Path
        from types import SimpleNamespace
        from hostruntime.container import delegation
        from orkestr_console.runner.doctor import cgroups
        from orkestr_console.runner.layout import layout_from
        subprocess.run(["mount", "-t", "tmpfs", "none", "/run"], check=True)
        delegation.cgroup_layout = lambda: SimpleNamespace(delegated=True)
        finding = cgroups.check_delegation(layout_from(), Path("/run"), Path({str(root)!r}))
        print(finding.verdict, finding.detail, finding.remedy)
        """,
        *("unshare", "--mount"),
    )
    assert printed.startswith("fail systemd does not run a unit of ours: `systemd-run")
    assert "systemctl status" in printed


def test_a_unit_without_a_controller_fails(
    layout: Layout,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    systemd_machine: Path,
) -> None:
    asked: list[list[str]] = []

    def answer(argv: list[str], **_: object) -> Completed:
        asked.append(argv)
        return Completed(tuple(argv), 0, b"cpu pids\n", b"")

    monkeypatch.setattr(delegation, "run", answer)
    finding = cgroups.check_delegation(layout, systemd=tmp_path, root=systemd_machine)
    assert finding.verdict == "fail"
    assert "delegates no memory controller" in finding.detail
    assert "--property=Delegate=yes" in asked[0]


# Software ---------------------------------------------------------------------------------


def test_missing_programs_are_named_by_their_package(
    layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = shutil.which
    absent = {"squid", "nft"}
    monkeypatch.setattr(
        shutil, "which", lambda name, path=None: None if name in absent else found(name, path=path)
    )
    finding = software.check_programs(layout)
    assert finding.verdict == "fail"
    assert "apt-get install nftables squid-openssl" in finding.remedy


@pytest.fixture
def with_apparmor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A kernel that has AppArmor on, to look at; where it would list its profiles."""
    enabled, listed = tmp_path / "enabled", tmp_path / "security"
    enabled.write_text("Y\n")
    monkeypatch.setattr(apparmor, "_ENABLED", enabled)
    monkeypatch.setattr(apparmor, "_SECURITYFS", listed)
    return listed


def test_apparmor_is_well_when_its_parser_takes_the_profile(
    layout: Layout, with_apparmor: Path
) -> None:
    with_apparmor.mkdir()
    (with_apparmor / "profiles").write_text("lsb_release (enforce)\n")
    assert software.check_apparmor(layout).verdict == "ok"


def test_apparmor_whose_files_are_not_mounted_fails(layout: Layout, with_apparmor: Path) -> None:
    finding = software.check_apparmor(layout)
    assert finding.verdict == "fail"
    assert "mount -t securityfs" in finding.detail


def test_apparmor_without_its_parser_fails(
    layout: Layout, with_apparmor: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(apparmor, "_PARSER", "apparmor_parser.absent")
    finding = software.check_apparmor(layout)
    assert finding.verdict == "fail"
    assert "apt-get install apparmor" in finding.remedy


# The network ------------------------------------------------------------------------------


def test_a_taken_port_names_the_next_one() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        finding = network.check_port(layout_from({"PORT": str(port), "ORKESTR_VAR": "/nowhere"}))
    assert finding.verdict == "fail"
    assert f"PORT={port + 1}" in finding.remedy


def test_an_address_that_is_not_this_machines_is_said_before_anything_starts() -> None:
    named = layout_from({"ORKESTR_LISTEN": "192.0.2.77", "ORKESTR_VAR": "/nowhere"})
    finding = network.check_port(named)
    assert (finding.verdict, finding.detail) == ("fail", "192.0.2.77 is no address of this machine")


def test_a_firewall_in_the_way_is_a_warning_with_its_remedy(layout: Layout) -> None:
    rules = (
        b"table ip f { chain f { type filter hook forward priority filter; policy drop; \n } \n }"
    )

    def beside_a_firewall() -> Finding:
        # Of this thread alone (unshare(2)), and of the programs it starts.
        os.unshare(os.CLONE_NEWNET)
        assert network.check_firewalls(layout).verdict == "ok"
        run(["nft", "-f", "-"], input=rules, timeout=20)
        return network.check_firewalls(layout)

    with ThreadPoolExecutor(max_workers=1) as thread:
        finding = thread.submit(beside_a_firewall).result()
    assert finding.verdict == "warn"
    assert "ip f f drops forwarded packets" in finding.detail
    assert "nft 'insert rule ip f f iifname" in finding.remedy


def test_a_proxy_that_cannot_run_fails(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "proxy_problems", lambda: ["Squid cannot peek."])
    finding = network.check_proxy(layout)
    assert (finding.verdict, finding.detail) == ("fail", "Squid cannot peek.")
    assert "squid-openssl" in finding.remedy


def test_registries_that_nobody_can_name_are_a_warning(
    layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing = combine(None, None, [])
    monkeypatch.setattr(network, "host_registries", lambda _: nothing)
    finding = network.check_registries(layout)
    assert finding.verdict == "warn"
    assert "apt names no Debian mirror" in finding.detail


# The machine ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gibibytes", "verdict"), [(100, "ok"), (4, "ok"), (3, "warn"), (0.5, "fail")]
)
def test_a_full_disk_warns_and_then_fails(
    layout: Layout, monkeypatch: pytest.MonkeyPatch, gibibytes: float, verdict: str
) -> None:
    free, gib = int(gibibytes * machine.GIB), machine.GIB
    room = DiskSpace(layout.state_dir, 20 * gib, free, 0, 0, reserve_bytes=gib, reserve_files=0)
    monkeypatch.setattr(DiskSpace, "of", lambda _path: room)
    finding = machine.check_disk(layout)
    assert finding.verdict == verdict
    assert bool(finding.remedy) == (verdict != "ok")


def test_a_state_directory_on_memory_is_refused() -> None:
    finding = machine.check_state_directory(layout_from({"ORKESTR_STATE_DIR": "/dev/shm/host"}))
    assert finding.verdict == "fail"
    assert "ORKESTR_STATE_DIR" in finding.remedy


@pytest.mark.parametrize(
    ("option", "words", "remedy"),
    [("noexec", "mounted noexec", "remount,exec"), ("ro", "is read-only", "remount,rw")],
)
def test_a_state_directory_that_nothing_can_be_done_in_is_refused(
    tmp_path: Path, option: str, words: str, remedy: str
) -> None:
    printed = on_its_own(
        f"""
        import subprocess
        from orkestr_console.runner.doctor import machine
        from orkestr_console.runner.layout import layout_from
        subprocess.run(["mount", "--bind", {str(tmp_path)!r}, {str(tmp_path)!r}], check=True)
        change = ["mount", "-o", "remount,bind,{option}", {str(tmp_path)!r}]
        subprocess.run(change, check=True)
        layout = layout_from({{"ORKESTR_VAR": {str(tmp_path)!r}}})
        for check in (machine.check_state_directory, machine.check_writable):
            finding = check(layout)
            print(finding.verdict, finding.detail, finding.remedy)
        """,
        *("unshare", "--mount"),
    )
    state, writable = printed.splitlines()
    assert state.startswith("fail")
    assert words in state
    assert f"mount -o {remedy} {tmp_path}" in state
    assert writable.startswith("fail" if option == "ro" else "ok")


def test_a_clock_before_the_machine_was_installed_is_behind(layout: Layout, tmp_path: Path) -> None:
    written = tmp_path / "status"
    written.touch()
    assert machine.check_clock(layout, [written]).verdict == "ok"
    later = time.time() + 30 * 86_400
    os.utime(written, (later, later))
    finding = machine.check_clock(layout, [written])
    assert finding.verdict == "fail"
    assert "timedatectl" in finding.remedy


# All of it --------------------------------------------------------------------------------


def test_every_check_answers_here(layout: Layout) -> None:
    findings = list(examine(layout))
    assert len({finding.name for finding in findings}) == len(findings)
    assert all(finding.detail for finding in findings)
    assert all(finding.remedy for finding in findings if finding.verdict != "ok")


def test_who_is_not_root_is_told_what_cannot_be_seen(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    printed = on_its_own(
        f"""
        import ctypes.util, encodings.idna, json, os
        from concurrent.futures import thread
        from orkestr_console.runner.doctor import examine
        from orkestr_console.runner.layout import layout_from
        # The state directory, and maybe this Python, are in directories that are closed to nobody.
        layout = layout_from({{"ORKESTR_VAR": {str(tmp_path)!r}}})
        os.setgroups([]); os.setresgid(65534, 65534, 65534); os.setresuid(65534, 65534, 65534)
        print(json.dumps([[f.name, f.verdict, f.detail, f.remedy] for f in examine(layout)]))
        """
    )
    findings = {name: rest for name, *rest in json.loads(printed)}
    for name in ("kernel features", "firewalls", "egress proxy"):
        verdict, seen, remedy = findings[name]
        assert (verdict, seen) == ("warn", "cannot be seen without root")
        assert "sudo" in remedy
    assert findings["kernel"][0] == "ok"


# What is kept -----------------------------------------------------------------------------


def test_a_database_that_is_not_the_states_is_said(layout: Layout) -> None:
    paths = StatePaths(layout.state_dir)
    layout.state_dir.parent.mkdir(parents=True, exist_ok=True)
    assert keeping.check_installation(layout).verdict == "ok"
    assert keeping.check_quarantine(layout).verdict == "ok"
    book = InstallationStore(paths.ensure())
    book.agree(Claim("ours", 1, "one"), empty=True, known=False)
    assert keeping.check_installation(layout).verdict == "ok"
    with pytest.raises(InstallationMismatch):
        book.agree(Claim("anothers", 9, "two"), empty=False, known=False)
    found = keeping.check_installation(layout)
    assert found.verdict == "fail"
    assert "another installation" in found.detail
    assert "installation accept" in found.remedy


def test_what_was_set_aside_is_named(layout: Layout) -> None:
    paths = StatePaths(layout.state_dir).ensure()
    (paths.images / "img_one").mkdir()
    Quarantine(paths, Trash(paths)).add(paths.images / "img_one", "image", "damaged", "it is bad")
    found = keeping.check_quarantine(layout)
    assert found.verdict == "warn"
    assert "image.img_one (damaged)" in found.detail
    assert "quarantine list" in found.remedy

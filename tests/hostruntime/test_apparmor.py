"""The profile for sandboxes: a real parser takes it, and no start needs a program for it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from hostruntime.container import apparmor
from hostruntime.container.cgroups import CgroupLayout
from hostruntime.container.config import CAPABILITIES, ContainerConfig
from hostruntime.container.limits import Limits
from hostruntime.errors import HostUnavailable


def test_the_parser_takes_the_profile() -> None:
    apparmor.check()


def test_the_parser_takes_it_without_debians_abi_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(apparmor.profile, "__defaults__", (tmp_path / "3.0",))
    assert not apparmor.profile("orkestr-0").startswith("abi")
    apparmor.check()


def test_a_rule_that_the_parser_does_not_know_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apparmor, "_RULES", apparmor._RULES.replace("deny mount,", "deny mounts,"))
    with pytest.raises(HostUnavailable, match="profile for sandboxes cannot be used"):
        apparmor.check()


def test_it_grants_the_capabilities_that_containers_keep_and_no_others() -> None:
    containers, _, start = apparmor.profile("orkestr-0").partition("profile orkestr-0-start ")
    lines = [line for line in containers.splitlines() if "capability" in line]
    assert lines == [f"  capability {' '.join(CAPABILITIES)},"]
    assert "  /.orkestr/init px -> orkestr-0,\n" in start, "and LXC's own ends where init begins"


def test_no_container_asks_lxc_for_a_profile_of_its_own() -> None:
    """`generated` has LXC run apparmor_parser by PATH, and launchers have none."""
    layout = CgroupLayout("v2", Path("/sys/fs/cgroup"), {}, (Path("/sys/fs/cgroup"),))
    for label in (None, "orkestr-3"):
        config = ContainerConfig(
            name="ork3-a",
            hostname="sandbox",
            root=Path("/root"),
            id_base=1,
            netns=None,
            limits=Limits(cpu=1.0, memory_mb=1024),
            seccomp=Path("/seccomp"),
            apparmor=label,
            log=Path("/log"),
        )
        items = [value for key, value in config.items(layout) if key.startswith("lxc.apparmor")]
        assert items == ([] if label is None else ["orkestr-3"])


def test_the_parser_is_among_what_the_installer_installs() -> None:
    assert shutil.which("apparmor_parser", path="/usr/sbin:/sbin")

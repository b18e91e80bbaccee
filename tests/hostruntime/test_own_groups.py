"""Which control groups a launcher moves its spawners back to."""

from __future__ import annotations

from pathlib import Path

import pytest

from hostruntime.container import cgroups
from hostruntime.container.cgroups import CgroupLayout


def paths(monkeypatch: pytest.MonkeyPatch, file: Path, text: str) -> None:
    file.write_text(text)
    found = cgroups._own_paths(file)
    monkeypatch.setattr(cgroups, "_own_paths", lambda: found)


def test_in_the_hybrid_layout_there_is_one_in_each_hierarchy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (
        "5:cpuacct,cpu:/system.slice/agent.service\n4:memory:/\n3:pids:/a\n"
        "1:name=systemd:/system.slice/agent.service\n0::/system.slice/agent.service\n"
    )
    paths(monkeypatch, tmp_path / "cgroup", text)
    names = ("cpu,cpuacct", "memory", "net_cls", "pids", "systemd", "unified")
    hierarchies = tuple(tmp_path / name for name in names)
    for each in hierarchies:
        (each / "ork0/ork0-x").mkdir(parents=True)
    (hierarchies[3] / "ork0/ork0-x").rmdir()
    layout = CgroupLayout("hybrid", hierarchies[-1], {}, hierarchies)
    groups = layout.container("ork0-x")
    service = "system.slice/agent.service"
    assert groups.own_groups() == [
        *(tmp_path / "cpu,cpuacct" / service, tmp_path / "memory", tmp_path / "net_cls"),
        *(tmp_path / "systemd" / service, tmp_path / "unified" / service),
    ]
    # One for each that a command is in, in the same order.
    assert len(groups.own_groups()) == len(groups.command_groups())


def test_containers_have_no_group_where_nothing_limits_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cgroups, "CGROUPS", tmp_path)
    names = ("blkio", "cpu,cpuacct", "freezer", "memory", "pids", "systemd", "unified")
    hierarchies = tuple(tmp_path / name for name in names)
    for each in hierarchies:
        each.mkdir()
    (tmp_path / "cpu").symlink_to("cpu,cpuacct")
    v1 = {name: tmp_path / name for name in ("cpu", "memory", "pids")}
    layout = CgroupLayout("hybrid", tmp_path / "unified", v1, hierarchies)
    assert layout.unused() == [tmp_path / "blkio", tmp_path / "freezer"]
    assert CgroupLayout("v2", tmp_path, {}, (tmp_path,)).unused() == []


def test_with_v2_alone_there_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths(monkeypatch, tmp_path / "cgroup", "0::/orkestr.slice/agent.service\n")
    layout = CgroupLayout("v2", tmp_path, {}, (tmp_path,), delegated=True)
    own = layout.container("ork0-x").own_groups()
    assert own == [tmp_path / "orkestr.slice/agent.service"]

"""The runtime layers, as trees on disk; with registries that do not exist."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from hostruntime import runtime_layer
from hostruntime.errors import HostUnavailable
from hostruntime.network import SlotPool
from hostruntime.network_settings import NetworkSettings
from hostruntime.paths import Instance, StatePaths
from hostruntime.policy import MODES, deny_list
from hostruntime.registries import AptSource, NpmAnswer, PipAnswer, Registries, combine
from hostruntime.runtime_layer import (
    build_runtime_layers,
    container_environment,
    runtime_tree,
)

PIP = PipAnswer("https://mirror.example/simple", (), "https://index.example/simple/", None)
NPM = NpmAnswer("https://npm.example/", ())
APT = [AptSource("http://debs.example/debian", "", "main")]
SETTINGS = NetworkSettings(deny_list(), (), ("198.51.100.53", "2001:db8::53"))


@pytest.fixture
def paths(tmp_path: Path) -> StatePaths:
    return StatePaths(tmp_path / "state").ensure()


@pytest.fixture
def pool(paths: StatePaths) -> SlotPool:
    return SlotPool(paths, Instance(3), SETTINGS)


@pytest.fixture(autouse=True)
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Stand in for the host's files and for its package managers' answers."""
    (tmp_path / "init").write_bytes(b"init")
    (tmp_path / "bundle").write_bytes(b"authorities")
    (tmp_path / "cas" / "deep").mkdir(parents=True)
    (tmp_path / "cas" / "deep" / "edge.crt").write_bytes(b"edge")
    monkeypatch.setattr(runtime_layer, "_INIT_BINARIES", (tmp_path / "init",))
    monkeypatch.setattr(runtime_layer, "_HOST_LOCAL_CAS", tmp_path / "cas")
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "bundle"))
    answer(monkeypatch, combine(PIP, NPM, APT))
    yield tmp_path


def answer(monkeypatch: pytest.MonkeyPatch, registries: Registries) -> None:
    monkeypatch.setattr(runtime_layer, "host_registries", lambda _: registries)


def texts(tree: Path) -> dict[str, str]:
    found = (path for path in tree.rglob("*") if path.is_file())
    return {str(path.relative_to(tree)): path.read_text() for path in found}


def test_every_mode_has_the_same_files_but_its_own_way_out(
    paths: StatePaths, pool: SlotPool
) -> None:
    build_runtime_layers(paths, pool)
    trees = {mode: texts(runtime_tree(paths, mode)) for mode in MODES}
    assert len({frozenset(files) for files in trees.values()}) == 1
    differing = {
        name for name in trees["off"] if len({files[name] for files in trees.values()}) > 1
    }
    assert differing == {"etc/resolv.conf", "etc/apt/apt.conf.d/80orkestr"}
    assert trees["open"]["etc/resolv.conf"] == "nameserver 198.51.100.53\n"
    assert "nameserver" not in trees["off"]["etc/resolv.conf"]
    assert "nameserver" not in trees["restricted"]["etc/resolv.conf"]
    proxy = 'Acquire::https::Proxy "http://10.203.0.1:13128";'
    assert [proxy in trees[mode]["etc/apt/apt.conf.d/80orkestr"] for mode in MODES] == [
        False,
        True,
        False,
    ]


def test_package_managers_are_configured_as_the_hosts_are(
    paths: StatePaths, pool: SlotPool
) -> None:
    build_runtime_layers(paths, pool)
    files = texts(runtime_tree(paths, "restricted"))
    assert files["etc/pip.conf"] == "[global]\nindex-url = https://mirror.example/simple\n\n"
    assert "registry=https://npm.example/\n" in files["etc/npmrc"]
    assert files["etc/apt/sources.list"] == "deb https://debs.example/debian bookworm main\n"
    assert files["etc/ssl/certs/ca-certificates.crt"] == "authorities"
    assert files["usr/local/share/ca-certificates/edge.crt"] == "edge"
    assert files[".orkestr/init"] == "init"


def test_nothing_is_configured_that_the_host_does_not_know(
    paths: StatePaths, pool: SlotPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer(monkeypatch, combine(None, None, []))
    build_runtime_layers(paths, pool)
    files = texts(runtime_tree(paths, "open"))
    assert not {"etc/pip.conf", "etc/apt/sources.list"} & set(files)


def test_directories_show_through_with_their_usual_modes(paths: StatePaths, pool: SlotPool) -> None:
    build_runtime_layers(paths, pool)
    tree = runtime_tree(paths, "open")
    directories = [tree, *(path for path in tree.rglob("*") if path.is_dir())]
    assert {path.stat().st_mode & 0o7777 for path in directories} == {0o755}
    assert {path.stat().st_uid for path in tree.rglob("*")} == {0}
    modes = {path.name: path.stat().st_mode & 0o7777 for path in tree.rglob("*") if path.is_file()}
    assert modes.pop("init") == 0o755
    assert set(modes.values()) == {0o644}


def test_the_same_host_gives_the_same_trees_and_a_changed_one_new_trees(
    paths: StatePaths, pool: SlotPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_runtime_layers(paths, pool)
    before = {mode: runtime_tree(paths, mode) for mode in MODES}
    build_runtime_layers(paths, pool)
    assert before == {mode: runtime_tree(paths, mode) for mode in MODES}
    answer(monkeypatch, combine(None, NPM, APT))
    build_runtime_layers(paths, pool)
    after = {mode: runtime_tree(paths, mode) for mode in MODES}
    assert not set(after.values()) & set(before.values())
    assert not any(tree.exists() for tree in before.values()), "no container had them mounted"
    assert sorted(path.name for path in paths.runtime.iterdir()) == sorted(
        (*MODES, *(tree.name for tree in after.values()))
    )


def test_a_tree_a_container_has_mounted_is_kept(
    paths: StatePaths, pool: SlotPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_runtime_layers(paths, pool)
    used = runtime_tree(paths, "open")
    monkeypatch.setattr(runtime_layer, "_mounted_roots", lambda: [f"/somewhere/{used.name}"])
    answer(monkeypatch, combine(None, None, []))
    build_runtime_layers(paths, pool)
    assert used.is_dir()
    assert runtime_tree(paths, "open") != used


def test_a_half_made_tree_is_made_anew(paths: StatePaths, pool: SlotPool) -> None:
    build_runtime_layers(paths, pool)
    tree = runtime_tree(paths, "off")
    half = tree.with_name(f".{tree.name}.making")
    tree.rename(half)
    (half / "etc" / "stray").write_text("x")
    build_runtime_layers(paths, pool)
    assert not half.exists()
    assert not (runtime_tree(paths, "off") / "etc" / "stray").exists()


def test_what_the_host_lacks_is_named_with_its_package(
    paths: StatePaths, pool: SlotPool, host: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(HostUnavailable, match="not built"):
        runtime_tree(paths, "off")
    (host / "init").unlink()
    with pytest.raises(HostUnavailable, match="install the package catatonit"):
        build_runtime_layers(paths, pool)
    (host / "init").touch()
    (host / "bundle").unlink()
    monkeypatch.setattr(runtime_layer, "_HOST_BUNDLES", (host / "nowhere",))
    with pytest.raises(HostUnavailable, match="install the package ca-certificates"):
        build_runtime_layers(paths, pool)


def test_only_restricted_processes_are_told_of_the_proxy(pool: SlotPool) -> None:
    environments = {mode: container_environment(mode, pool) for mode in MODES}
    for mode, environment in environments.items():
        assert environment["HOME"] == "/root"
        assert environment["PIP_CERT"] == "/etc/ssl/certs/ca-certificates.crt"
        assert ("https_proxy" in environment) is (mode == "restricted")
    assert environments["off"] == environments["open"]
    assert environments["restricted"]["HTTPS_PROXY"] == "http://10.203.0.1:13128"

"""The runtime layers, as trees on disk; with registries that do not exist."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from hostruntime.container import host_files, runtime_layer
from hostruntime.container.host_files import container_environment
from hostruntime.container.runtime_layer import RuntimeTrees, build_runtime_layers, remove_unused
from hostruntime.errors import HostUnavailable
from hostruntime.host.paths import Instance, StatePaths
from hostruntime.host.run import run
from hostruntime.network.policy import MODES, Mode, Policy, deny_list
from hostruntime.network.registries import AptSource, NpmConfig, PipConfig, Registries, combine
from hostruntime.network.settings import NetworkSettings
from hostruntime.network.slots import SlotPool
from hostruntime.network.stub_resolver import ADDRESS as STUB
from tests.hostruntime.trees_help import grow

PIP = PipConfig("https://mirror.example/simple", (), "https://index.example/simple/", None)
NPM = NpmConfig("https://npm.example/", ())
APT = [AptSource("http://debs.example/debian", "", "main")]
CERTIFICATE = "-----BEGIN CERTIFICATE-----\naG9zdA==\n-----END CERTIFICATE-----"
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
    (tmp_path / "bundle").write_text(CERTIFICATE)
    (tmp_path / "cas" / "deep").mkdir(parents=True)
    (tmp_path / "cas" / "deep" / "edge.crt").write_bytes(b"edge")
    monkeypatch.setattr(host_files, "_INIT_BINARIES", (tmp_path / "init",))
    monkeypatch.setattr(host_files, "_HOST_LOCAL_CAS", tmp_path / "cas")
    monkeypatch.setattr(host_files, "_HOST_PUBLIC_CAS", tmp_path / "public")
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "bundle"))
    answer(monkeypatch, combine(PIP, NPM, APT))
    monkeypatch.setattr(runtime_layer, "default_domains", lambda _: ["github.com"])
    yield tmp_path


def answer(monkeypatch: pytest.MonkeyPatch, registries: Registries) -> None:
    monkeypatch.setattr(runtime_layer, "host_registries", lambda _: registries)


def texts(tree: Path) -> dict[str, str]:
    found = (path for path in tree.rglob("*") if path.is_file())
    return {str(path.relative_to(tree)): path.read_text(errors="replace") for path in found}


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """An image with nothing in it that anything is joined with."""
    return grow(tmp_path / "image", {"etc/": None, "root/": None})


def tree_for(
    paths: StatePaths, image: Path, mode: Mode = "restricted", domains: tuple[str, ...] = ()
) -> Path:
    return RuntimeTrees(paths).tree(Policy(mode, domains or None), image)


def test_every_mode_has_its_own_way_out(paths: StatePaths, pool: SlotPool, image: Path) -> None:
    build_runtime_layers(paths, pool)
    trees = {mode: texts(tree_for(paths, image, mode)) for mode in MODES}
    assert trees["off"].keys() == trees["open"].keys() < trees["restricted"].keys()
    assert trees["open"]["etc/resolv.conf"] == "nameserver 198.51.100.53\n"
    for mode in ("off", "restricted"):
        assert f"\nnameserver {STUB}\n" in trees[mode]["etc/resolv.conf"]
    told = {
        mode: {path for path, text in files.items() if "10.203.0.1" in text}
        for mode, files in trees.items()
    }
    assert told == {
        "off": set(),
        "open": set(),
        "restricted": {
            "etc/apt/apt.conf.d/80orkestr",
            "etc/environment",
            "etc/profile.d/00-orkestr.sh",
            "usr/lib/lsb/init-functions.d/00-orkestr",
            "etc/npmrc",
            "usr/local/etc/npmrc",
            "etc/xdg/pip/pip.conf",
            ".orkestr/gitconfig",
            ".yarnrc.yml",
            "root/.gnupg/dirmngr.conf",
        },
    }


def test_package_managers_are_configured_as_the_hosts_are(
    paths: StatePaths, pool: SlotPool, image: Path
) -> None:
    build_runtime_layers(paths, pool)
    files = texts(tree_for(paths, image))
    pip = files["etc/xdg/pip/pip.conf"]
    assert "index-url = https://mirror.example/simple\n" in pip
    assert "proxy = http://10.203.0.1:13128\n" in pip
    assert "registry=https://npm.example/\n" in files["etc/npmrc"]
    assert "npmRegistryServer: https://npm.example/\n" in files[".yarnrc.yml"]
    sources = files["etc/apt/sources.list"].splitlines()
    assert sources[1:-1] == ["deb https://debs.example/debian bookworm main"]
    assert CERTIFICATE in files["etc/ssl/certs/ca-certificates.crt"]
    assert files["usr/local/share/ca-certificates/edge.crt"] == "edge"
    assert files[".orkestr/init"] == "init"


def test_nothing_is_configured_that_the_host_does_not_know(
    paths: StatePaths, pool: SlotPool, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer(monkeypatch, combine(None, None, []))
    build_runtime_layers(paths, pool)
    files = texts(tree_for(paths, image, "open"))
    assert "index-url" not in files["etc/xdg/pip/pip.conf"]
    assert not {"etc/apt/sources.list", ".yarnrc.yml"} & set(files)


def test_with_network_off_each_program_is_told_so_and_the_image_has_the_last_word(
    paths: StatePaths, pool: SlotPool, image: Path
) -> None:
    build_runtime_layers(paths, pool)
    grow(image, {"etc/npmrc": "offline=false\n"})
    trees = {mode: texts(tree_for(paths, image, mode)) for mode in MODES}
    said = {
        "etc/npmrc": "\noffline=true\n",
        "usr/local/etc/npmrc": "\noffline=true\n",
        "etc/xdg/pip/pip.conf": "\nretries = 1\n",
        ".yarnrc.yml": "\nenableNetwork: false\n",
        "etc/apt/apt.conf.d/80orkestr": '\nAcquire::Retries "0";\n',
        "etc/environment": "\nUV_OFFLINE=1\n",
        "etc/profile.d/00-orkestr.sh": '\n[ -n "${UV_OFFLINE+set}" ] || export UV_OFFLINE=1\n',
    }
    for path, line in said.items():
        assert {mode: line in trees[mode][path] for mode in MODES} == {
            "off": True,
            "restricted": False,
            "open": False,
        }, path
    assert trees["off"]["etc/npmrc"].endswith("\noffline=false\n")


def test_directories_show_through_with_the_images_owners_and_modes(
    paths: StatePaths, pool: SlotPool, image: Path
) -> None:
    build_runtime_layers(paths, pool)
    (image / "etc/ssl").mkdir()
    (image / "etc/ssl").chmod(0o711)
    os.chown(image / "root", 33, 44)
    (image / "root").chmod(0o750)
    tree = tree_for(paths, image)
    found = {
        str(path.relative_to(tree)): (stat.S_IMODE(mode.st_mode), mode.st_uid, mode.st_gid)
        for path in tree.rglob("*")
        if path.is_dir() and (mode := path.stat())
    }
    assert found.pop("etc/ssl") == (0o711, 0, 0)
    assert found.pop("root") == (0o750, 33, 44)
    assert found.pop("root/.gnupg") == (0o700, 0, 0)
    assert found.pop("etc/sudoers.d") == (0o750, 0, 0)
    assert set(found.values()) == {(0o755, 0, 0)}
    assert stat.S_IMODE((tree / ".orkestr/init").stat().st_mode) == 0o755
    assert stat.S_IMODE((tree / "etc/sudoers.d/orkestr").stat().st_mode) == 0o440


def test_a_directory_that_is_a_link_in_the_image_is_left_alone(
    paths: StatePaths, pool: SlotPool, tmp_path: Path
) -> None:
    build_runtime_layers(paths, pool)
    image = grow(tmp_path / "other", {"etc/": None, "srv/own/": None})
    (image / "root").symlink_to("srv/own")
    (image / "usr").symlink_to("/srv")
    files = texts(tree_for(paths, image))
    assert not any(path.startswith(("root/", "usr/")) for path in files)
    assert "etc/hosts" in files


def test_the_same_host_gives_the_same_trees_and_a_changed_one_new_trees(
    paths: StatePaths, pool: SlotPool, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_runtime_layers(paths, pool)
    before = {mode: tree_for(paths, image, mode) for mode in MODES}
    assert before == {mode: tree_for(paths, image, mode) for mode in MODES}
    answer(monkeypatch, combine(None, NPM, APT))
    build_runtime_layers(paths, pool)
    assert not any(tree.exists() for tree in before.values()), "no container had them mounted"
    after = {mode: tree_for(paths, image, mode) for mode in MODES}
    assert not set(after.values()) & set(before.values())


def test_images_without_files_of_their_own_share_a_tree(
    paths: StatePaths, pool: SlotPool, image: Path, tmp_path: Path
) -> None:
    build_runtime_layers(paths, pool)
    alike = grow(tmp_path / "alike", {"etc/": None, "root/": None, "opt/x": "theirs"})
    other = grow(tmp_path / "other", {"etc/hosts": "10.0.0.7 db\n", "root/": None})
    trees = RuntimeTrees(paths)
    policy = Policy("restricted")
    assert trees.tree(policy, alike) == trees.tree(policy, image) != trees.tree(policy, other)
    init = [trees.tree(policy, one) / ".orkestr/init" for one in (image, other)]
    assert init[0].stat().st_ino == init[1].stat().st_ino


def test_git_takes_the_https_of_the_containers_own_list(
    paths: StatePaths, pool: SlotPool, image: Path
) -> None:
    build_runtime_layers(paths, pool)
    config = tree_for(paths, image, domains=("@default", "git.corp.example")) / ".orkestr/gitconfig"
    asked = ["git", "config", "--file", str(config), "--get-urlmatch", "http.proxy"]
    said = [
        run([*asked, url], timeout=10).text.strip() for url in ("https://a", "http://localhost")
    ]
    assert said == ["http://10.203.0.1:13128", ""]
    text = config.read_text()
    assert "insteadOf = git@git.corp.example:\n" in text
    assert "insteadOf = ssh://git@github.com/\n" in text


def test_trees_that_differ_in_the_containers_own_list_share_all_other_files(
    paths: StatePaths, pool: SlotPool, tmp_path: Path
) -> None:
    """Else a few kilobytes of a stranger's list would cost the host what its image is joined of."""
    build_runtime_layers(paths, pool)
    image = grow(tmp_path / "large", {"etc/hosts": "10.0.0.7 db\n" * 100_000})
    trees = [tree_for(paths, image, domains=(f"{n}.example",)) for n in range(3)]
    assert len(set(trees)) == 3
    for path in (path for path in trees[0].rglob("*") if path.is_file()):
        name = path.relative_to(trees[0])
        inodes = {(tree / name).stat().st_ino for tree in trees}
        assert len(inodes) == (3 if name == Path(".orkestr/gitconfig") else 1), name


def test_a_file_that_can_have_no_more_names_is_written_anew(
    paths: StatePaths, pool: SlotPool, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_runtime_layers(paths, pool)

    def too_many(*_: object) -> None:
        raise OSError(errno.EMLINK, "Too many links")

    monkeypatch.setattr(os, "link", too_many)
    tree = tree_for(paths, image)
    assert (tree / ".orkestr/init").read_bytes() == b"init"
    assert stat.S_IMODE((tree / ".orkestr/init").stat().st_mode) == 0o755


def test_a_tree_a_container_has_mounted_or_just_got_is_kept(
    paths: StatePaths, pool: SlotPool, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_runtime_layers(paths, pool)
    used, unused = tree_for(paths, image, "open"), tree_for(paths, image, "off")
    remove_unused(paths)
    assert used.is_dir()
    assert unused.is_dir(), "it may be about to be mounted"
    monkeypatch.setattr(runtime_layer, "_mounted_roots", lambda: [f"/somewhere/{used.name}"])
    build_runtime_layers(paths, pool)
    assert used.is_dir()
    assert not unused.exists()
    assert tree_for(paths, image, "off") == unused
    assert unused.is_dir()


def test_a_half_made_tree_is_made_anew(paths: StatePaths, pool: SlotPool, image: Path) -> None:
    build_runtime_layers(paths, pool)
    tree = tree_for(paths, image, "off")
    half = tree.with_name(f".{tree.name}.1-1.making")
    tree.rename(half)
    (half / "etc" / "stray").write_text("x")
    build_runtime_layers(paths, pool)
    assert not half.exists()
    assert not (tree_for(paths, image, "off") / "etc" / "stray").exists()


def test_what_the_host_lacks_is_named_with_its_package(
    paths: StatePaths, pool: SlotPool, host: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(HostUnavailable, match="not built"):
        tree_for(paths, host, "off")
    (host / "init").unlink()
    with pytest.raises(HostUnavailable, match="install the package catatonit"):
        build_runtime_layers(paths, pool)
    (host / "init").touch()
    (host / "bundle").unlink()
    monkeypatch.setattr(host_files, "_HOST_BUNDLES", (host / "nowhere",))
    with pytest.raises(HostUnavailable, match="install the package ca-certificates"):
        build_runtime_layers(paths, pool)


def test_only_restricted_processes_are_told_of_the_proxy(pool: SlotPool) -> None:
    environments = {mode: container_environment(mode, pool) for mode in MODES}
    for mode, environment in environments.items():
        assert environment["HOME"] == "/root"
        assert environment["PIP_CERT"] == "/etc/ssl/certs/ca-certificates.crt"
        assert ("https_proxy" in environment) is (mode == "restricted")
    trust = "-Djavax.net.ssl.trustStore=/.orkestr/cacerts.jks"
    told_off = {name for name in environments["off"] if "OFFLINE" in name}
    assert {"UV_OFFLINE", "HF_HUB_OFFLINE", "CARGO_NET_OFFLINE"} <= told_off
    assert not told_off & (environments["open"].keys() | environments["restricted"].keys())
    assert environments["open"].keys() - environments["off"].keys() == {"JAVA_TOOL_OPTIONS"}
    assert environments["open"]["JAVA_TOOL_OPTIONS"] == trust
    java = environments["restricted"]["JAVA_TOOL_OPTIONS"].split()
    assert {trust, "-Dhttps.proxyHost=10.203.0.1", "-Dhttps.proxyPort=13128"} <= set(java)
    assert environments["restricted"]["HTTPS_PROXY"] == "http://10.203.0.1:13128"

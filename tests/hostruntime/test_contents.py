"""What is installed in a tree, read from records that anybody may have written."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from hostruntime.image import contents
from hostruntime.image.contents import installed_packages
from tests.hostruntime.trees_help import grow

SITE = "usr/local/lib/python3.12/site-packages"
STATUS = """\
Package: libc6
Status: install ok installed
Architecture: amd64
Version: 2.36-9+deb12u9
Description: GNU C Library
 Version: 9.9-not-this
 .
 Package: nor-this

Package: gone
Status: deinstall ok config-files
Version: 1.0

Package: half
Status: install ok half-configured
Version: 1.0

Package: adduser
Version: 3.134
Status: hold ok installed
"""


def metadata(name: str, version: str) -> str:
    return f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n\nName: body\nVersion: 0\n"


def node(name: object, version: object) -> str:
    return json.dumps({"name": name, "version": version})


def found(tree: Path, manager: str) -> list[tuple[str, str]]:
    return list(installed_packages(tree).installed[manager])


def test_what_dpkg_has_installed(tmp_path: Path) -> None:
    grow(tmp_path, {"var/lib/dpkg/status": STATUS})
    assert found(tmp_path, "dpkg") == [("adduser", "3.134"), ("libc6", "2.36-9+deb12u9")]


@pytest.mark.parametrize(
    "site",
    [
        SITE,
        "usr/lib/python3/dist-packages",
        "usr/lib/python3.11/site-packages",
        "opt/venv/lib/python3.12/site-packages",
        "opt/conda/envs/data/lib/python3.12/site-packages",
        "root/.local/lib/python3.12/site-packages",
        "home/ann/.local/lib/python3.12/site-packages",
        "root/venv/lib/python3.12/site-packages",
    ],
)
def test_where_python_packages_are_found(tmp_path: Path, site: str) -> None:
    grow(
        tmp_path,
        {
            f"{site}/numpy-2.1.0.dist-info/METADATA": metadata("numpy", "2.1.0"),
            f"{site}/old.egg-info/PKG-INFO": metadata("old", "0.9"),
            f"{site}/flat-1.egg-info": metadata("Flat", "1"),
            f"{site}/numpy/__init__.py": "",
            f"{site}/no_record-1.dist-info/RECORD": "",
        },
    )
    assert found(tmp_path, "pip") == [("Flat", "1"), ("numpy", "2.1.0"), ("old", "0.9")]


def test_what_npm_has_installed_globally(tmp_path: Path) -> None:
    modules = "usr/local/lib/node_modules"
    grow(
        tmp_path,
        {
            f"{modules}/npm/package.json": node("npm", "10.9.0"),
            f"{modules}/npm/node_modules/inner/package.json": node("inner", "1"),
            f"{modules}/@scope/tool/package.json": node("@scope/tool", "2.0.0"),
            f"{modules}/none/index.js": "",
            "usr/lib/node_modules/debians/package.json": node("debians", "3"),
        },
    )
    assert found(tmp_path, "npm") == [
        ("@scope/tool", "2.0.0"),
        ("debians", "3"),
        ("npm", "10.9.0"),
    ]


def test_an_empty_tree_has_nothing_installed(tmp_path: Path) -> None:
    expected = {"packages": {"dpkg": [], "pip": [], "npm": []}, "truncated": False}
    assert installed_packages(tmp_path).to_json() == expected


# What a stranger may have put there ---------------------------------------------------------


@pytest.mark.parametrize(
    "link",
    [
        "var/lib/dpkg/status",
        "var/lib/dpkg",
        "var",
        f"{SITE}/x.dist-info/METADATA",
        f"{SITE}/x.dist-info",
        SITE,
        "usr/local/lib/python3.12",
        "usr/local/lib/node_modules/x/package.json",
        "usr/local/lib/node_modules/@s",
        "usr/local/lib/node_modules",
    ],
)
def test_no_link_is_followed(tmp_path: Path, link: str) -> None:
    outside = {
        name: text
        for name, text in {
            "var/lib/dpkg/status": STATUS,
            f"{SITE}/x.dist-info/METADATA": metadata("x", "1"),
            "usr/local/lib/node_modules/x/package.json": node("x", "1"),
            "usr/local/lib/node_modules/@s/x/package.json": node("@s/x", "1"),
        }.items()
        if name == link or name.startswith(f"{link}/")
    }
    assert outside
    grow(tmp_path / "outside", dict(outside))
    (tmp_path / "tree" / link).parent.mkdir(parents=True)
    (tmp_path / "tree" / link).symlink_to(tmp_path / "outside" / link)
    assert installed_packages(tmp_path / "outside").installed != {"dpkg": (), "pip": (), "npm": ()}
    assert set(installed_packages(tmp_path / "tree").installed.values()) == {()}


def test_pipes_and_directories_in_place_of_records_are_passed_over(tmp_path: Path) -> None:
    grow(
        tmp_path,
        {
            "var/lib/dpkg/": None,
            f"{SITE}/a.dist-info/METADATA/": None,
            f"{SITE}/b.dist-info/": None,
            "usr/local/lib/node_modules/x/": None,
            f"{SITE}/good.dist-info/METADATA": metadata("good", "1"),
        },
    )
    for name in (
        "var/lib/dpkg/status",
        f"{SITE}/b.dist-info/METADATA",
        f"{SITE}/c.egg-info",
        "usr/local/lib/node_modules/x/package.json",
    ):
        os.mkfifo(tmp_path / name)
    assert installed_packages(tmp_path).installed == {
        "dpkg": (),
        "pip": (("good", "1"),),
        "npm": (),
    }


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "null",
        "[1]",
        "[" * 100_000,
        '{"a":' * 100_000,
        node(["x"], {"y": 1}),
        node("", "1"),
        node("x", None),
        '{"name": "x", "version": "\\ud800"}',
        '{"name": "\\u0000\\u001b", "version": "1"}',
        '{"name": ' + "9" * 10_000 + "}",
        '{"name": "x", "version": "1"' + " " * 2_000_000 + "}",
    ],
)
def test_odd_json_is_left_out(tmp_path: Path, text: str) -> None:
    grow(tmp_path, {"usr/local/lib/node_modules/x/package.json": text})
    assert found(tmp_path, "npm") == []


def test_names_and_versions_are_fit_to_be_shown(tmp_path: Path) -> None:
    odd = f"a\x1b[31m\u202eb{'c' * 500}"
    grow(tmp_path, {f"{SITE}/a.dist-info/METADATA": metadata(odd, "1\t\x07.\u20282" + "9" * 500)})
    ((name, version),) = found(tmp_path, "pip")
    assert name == f"a[31mb{'c' * 500}"[: contents.NAME_CHARACTERS]
    assert version == f"1.2{'9' * 500}"[: contents.VERSION_CHARACTERS]


def test_undecodable_records_do_not_stop_it(tmp_path: Path) -> None:
    grow(
        tmp_path, {f"{SITE}/a.dist-info/": None, f"{SITE}/b.dist-info/METADATA": metadata("b", "1")}
    )
    (tmp_path / f"{SITE}/a.dist-info/METADATA").write_bytes(b"Name: \xff\xfe\nVersion: \x00\n")
    odd = os.fsdecode(b"\xff\n.dist-info")
    grow(tmp_path / SITE / odd, {"METADATA": metadata("odd", "2")})
    assert found(tmp_path, "pip") == [("b", "1"), ("odd", "2")]


def test_of_too_many_packages_the_first_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contents, "MAX_PACKAGES", 10)
    paragraphs = [
        f"Package: p{number:02}\nStatus: install ok installed\nVersion: 1\n" for number in range(11)
    ]
    grow(tmp_path, {"var/lib/dpkg/status": "\n".join(paragraphs[:10])})
    assert not installed_packages(tmp_path).truncated
    (tmp_path / "var/lib/dpkg/status").write_text("\n".join(paragraphs))
    packages = installed_packages(tmp_path)
    assert (len(packages.installed["dpkg"]), packages.truncated) == (10, True)


def test_records_that_say_nothing_are_not_looked_at_without_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contents, "_MAX_CANDIDATES", 20)
    grow(tmp_path, {f"{SITE}/x{number}.dist-info/METADATA": "" for number in range(30)})
    assert installed_packages(tmp_path).truncated

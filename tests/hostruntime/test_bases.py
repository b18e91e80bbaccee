"""The bases' definitions: all that makes one is in its digest, and ends up in its tree."""

from __future__ import annotations

import shlex
from dataclasses import fields, replace
from pathlib import Path

import pytest

from hostruntime.bases import debian
from hostruntime.bases.definitions import BASES, definition_digest
from tests.hostruntime.trees_help import grow

DEBIAN = BASES["debian-12"]


@pytest.mark.parametrize(
    "name", ["packages", "dpkg_options", "debconf", "directories", "files", "recipe"]
)
def test_a_changed_definition_makes_the_base_anew(name: str) -> None:
    assert name in {field.name for field in fields(DEBIAN)}
    changed = replace(DEBIAN, **{name: ("something else",)})  # type: ignore[arg-type]
    assert definition_digest(changed) != definition_digest(DEBIAN)


def test_mmdebstrap_is_told_all_of_it() -> None:
    words = debian._command(DEBIAN, Path("/target"), [])
    assert f"--include={','.join(DEBIAN.packages)}" in words
    for option in DEBIAN.dpkg_options:
        assert f"--dpkgopt={option}" in words
    hooks = [word for word in words if word.startswith("--essential-hook=")]
    assert len(hooks) == len(DEBIAN.debconf)
    assert shlex.split(hooks[0])[2] == DEBIAN.debconf[0]


def test_sections_of_the_manual_are_there_to_be_linked_into(tmp_path: Path) -> None:
    grow(tmp_path, {"usr/sbin/": None, "etc/apt/apt.conf.d/": None})
    debian._add(DEBIAN, tmp_path)
    for section in range(1, 10):
        assert (tmp_path / f"usr/share/man/man{section}").stat().st_mode & 0o777 == 0o755
    policy = tmp_path / "usr/sbin/policy-rc.d"
    assert policy.read_text().endswith("exit 101\n")
    assert policy.stat().st_mode & 0o111

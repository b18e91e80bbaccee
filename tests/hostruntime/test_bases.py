"""The bases' definitions: all that makes one is in its digest, and ends up in its tree."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shlex
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from hostruntime.build import bases
from hostruntime.build.bases import debian, provided
from hostruntime.build.bases.definitions import BASES, BaseDefinition, definition_digest
from hostruntime.errors import HostFault
from tests.hostruntime.trees_help import grow

DEBIAN = BASES["debian-12"]
ON_REQUEST = {base.name for base in BASES.values() if base.on_request}
ALWAYS = set(BASES) - ON_REQUEST


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
    debian._add_files(DEBIAN, tmp_path)
    for section in range(1, 10):
        assert (tmp_path / f"usr/share/man/man{section}").stat().st_mode & 0o777 == 0o755
    policy = tmp_path / "usr/sbin/policy-rc.d"
    assert policy.read_text().endswith("exit 101\n")
    assert policy.stat().st_mode & 0o111


RESOLVING = """\
I: running apt-get update...
Err:1 http://mirror.example/debian bookworm InRelease
  Temporary failure resolving 'mirror.example'
E: Failed to fetch http://mirror.example/debian/InRelease  Temporary failure resolving
E: Some index files failed to download. They have been ignored, or old ones used instead.
E: mmdebstrap failed to run
"""


@pytest.mark.parametrize(
    ("log", "reason"),
    [
        (
            RESOLVING,
            "Debian could not be fetched: http://mirror.example/debian/InRelease: "
            "Temporary failure resolving. Check",
        ),
        (
            "I: this\nE: no such option\nE: mmdebstrap failed to run\n",
            "Debian could not be bootstrapped: no such option. The",
        ),
        ("", "Debian could not be bootstrapped: it did not say why. The"),
    ],
)
def test_why_debian_could_not_be_made_is_a_sentence(log: str, reason: str) -> None:
    said = debian.failure_reason(log)
    assert said.startswith(reason)
    assert "\n" not in said


def test_when_a_base_is_made_is_not_part_of_it() -> None:
    """A digest that changed would have every installation make all its bases anew."""
    interpreter = BASES["code-interpreter"]
    at_start = replace(interpreter, on_request=False)
    assert definition_digest(at_start) == definition_digest(interpreter)
    assert definition_digest(replace(interpreter, node_from=None)) != definition_digest(interpreter)
    assert definition_digest(DEBIAN).startswith("d5fb426b5ff0")


def test_files_and_node_are_put_into_a_layer(tmp_path: Path) -> None:
    tree, layer = tmp_path / "tree", tmp_path / "layer"
    grow(
        tree,
        {
            "usr/local/bin/node": "node",
            "usr/local/lib/node_modules/npm/bin/npm-cli.js": "npm",
            "usr/local/include/node/v8.h": "headers",
        },
    )
    for name in ("npm", "npx"):
        (tree / "usr/local/bin" / name).symlink_to("../lib/node_modules/npm/bin/npm-cli.js")
    layer.mkdir()
    before = os.umask(0o077)
    try:
        provided.copy_node(tree, layer)
        provided.write_files([("usr/local/share/x/y.txt", 0o644, "text")], layer)
    finally:
        os.umask(before)
    assert (layer / "usr/local/bin/npx").read_text() == "npm"
    assert (layer / "usr/local/bin/npm").is_symlink()
    assert not (layer / "usr/local/include").exists()
    written = layer / "usr/local/share/x/y.txt"
    assert (written.read_text(), written.stat().st_mode & 0o777) == ("text", 0o644)
    for directory in ("usr", "usr/local/bin", "usr/local/lib/node_modules", "usr/local/share/x"):
        assert (layer / directory).stat().st_mode & 0o777 == 0o755, directory


class Flaky(bases.BaseBuilder):
    """Bases whose mirror is away for so many attempts at the first one."""

    def __init__(self, away: int) -> None:
        super().__init__(*[None] * 4)  # type: ignore[arg-type]
        self.away, self.made, self.attempts = away, set[str](), 0

    def _ready(self, base: BaseDefinition) -> Any:
        return base.name if base.name in self.made else None

    async def _build(self, base: BaseDefinition) -> Any:
        if base.parent is not None:
            await self.ensure(base.parent, lambda _: None)
        else:
            self.attempts += 1
            if self.attempts <= self.away:
                raise HostFault("the mirror is away")
        self.made.add(base.name)
        return base.name


async def test_what_could_not_be_made_is_tried_again_until_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bases, "_RETRY_SECONDS", 0.001)
    builder = Flaky(away=4)
    for base in BASES.values():
        with contextlib.suppress(HostFault):
            await builder.ensure(base.name, lambda _: None)
    async with asyncio.timeout(30):
        while not builder.made >= ALWAYS:
            await asyncio.sleep(0.01)
    # Who asked for one that is made on request was told.
    assert set(builder._failed) <= ON_REQUEST
    # Not once for each that wants it.
    assert builder.attempts <= 4 + len(BASES)
    await builder.close()


async def test_nothing_is_tried_again_after_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bases, "_RETRY_SECONDS", 0.05)
    builder = Flaky(away=100)
    with pytest.raises(HostFault):
        await builder.ensure("debian-12", lambda _: None)
    await builder.close()
    await asyncio.sleep(0.2)
    assert builder.attempts == 1

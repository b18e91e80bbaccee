"""A host whose containers are directories, to build on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hostruntime.build.layers import LayerStore
from hostruntime.build.manager import BuildManager
from hostruntime.build.plan import Host
from hostruntime.build.report import RefusedHost, UnreachedNotice
from hostruntime.host.paths import StatePaths
from hostruntime.image.store import ImageManifest, ImageStore
from hostruntime.wire.builds import StartBuild
from tests.hostruntime.fake_containers import FakeContainers, tree_of
from tests.hostruntime.trees_help import grow
from tests.trees import tree_digest


class World:
    """A host whose containers are fake, with one base image."""

    def __init__(self, root: Path) -> None:
        self.paths = StatePaths(root / "state").ensure()
        self.runtime = grow(root / "runtime", {"etc/resolv.conf": "lent"})
        self.refused: list[RefusedHost] = []
        self.unreached: list[UnreachedNotice] = []
        self.containers = FakeContainers()
        self.restart()
        staged = self.store.create_staging("debian-12")
        grow(staged / "tree", {"etc/conf": "base", "bin/sh": "shell"})
        self.store.publish(staged, ImageManifest("debian-12", "base", None, 1.0, 1, 1, 0))
        self.before = tree_digest(self.store.get("debian-12").tree)

    def restart(self) -> None:
        """As after an agent was killed: nothing in memory survives."""
        self.store = ImageStore(self.paths)
        host = Host(
            self.store,
            self.containers.as_manager(),
            lambda _policy, _image: self.runtime,
            lambda _owner, _since: self.refused,
            LayerStore(self.paths, self.store.trash, 1 << 40),
            lambda _owner, _since: self.unreached,
        )
        self.builds = BuildManager(self.paths, host)

    async def start(self, *recipe: str, build_id: str = "img_1", **changes: Any) -> None:
        fields = {"base_image": "debian-12", "network": "restricted", **changes}
        await self.builds.start(StartBuild(id=build_id, recipe=recipe, **fields))

    async def events(self, build_id: str = "img_1", *, follow: bool = True) -> list[dict[str, Any]]:
        told = await self.builds.events(build_id, follow=follow)
        data = b"".join([lines async for lines in told])
        return [json.loads(line) for line in data.splitlines() if line]

    async def build(self, *recipe: str, **changes: Any) -> list[dict[str, Any]]:
        await self.start(*recipe, **changes)
        return await self.events(changes.get("build_id", "img_1"))

    def check_clean(self, build_id: str = "img_1") -> None:
        """Nothing is left of a build but its record and what it published."""
        assert tree_of(self.paths.builds / build_id) == {"build.json", "events.ndjson"}
        assert tree_of(self.paths.staging) == set()
        assert self.containers.specs == {}
        assert self.store.users("debian-12") == set()
        assert self.store.trash.wait()
        assert tree_of(self.paths.trash) == set()
        assert tree_digest(self.store.get("debian-12").tree) == self.before


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)

"""Bases that are made when somebody asks: once, told to all who wait, continued after a kill."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest

from hostruntime.build import bases
from hostruntime.build.bases.definitions import BASES, BaseDefinition
from hostruntime.errors import HostError, HostFull, ImageNotFound
from hostruntime.host.paths import StatePaths
from hostruntime.wire.images import BaseInfo

NAME = "code-interpreter"


class Maker(bases.BaseBuilder):
    """Makes bases in no time, once it may; ``made`` are there already."""

    def __init__(self, root: Path, made: set[str]) -> None:
        super().__init__(StatePaths(root).ensure(), *[None] * 3)  # type: ignore[arg-type]
        self.made, self.attempts = made, list[str]()
        self.may, self.error = asyncio.Event(), None

    may: asyncio.Event
    error: HostError | None

    def _ready(self, base: BaseDefinition) -> Any:
        return base.name if base.name in self.made else None

    def _is_wanted(self, base: BaseDefinition) -> bool:
        return self._marker(base).exists()

    def _status(self, base: BaseDefinition, image: Any) -> BaseInfo:
        state = super()._status(base, None)
        return state if image is None else BaseInfo(base.name, "", "", "ready")

    async def ensure(self, name: str, progress: bases.Progress) -> Any:
        return await super().ensure(name, progress)

    async def _make(self, base: BaseDefinition) -> Any:
        self.attempts.append(base.name)
        report = self._building[base.name].report
        report(f"Making {base.name}")
        await self.may.wait()
        if self.error is not None:
            raise self.error
        self.made.add(base.name)
        return base.name


@pytest.fixture
def made() -> set[str]:
    return {base.name for base in BASES.values() if not base.on_request}


async def state_of(maker: Maker, name: str = NAME) -> BaseInfo:
    return next(base for base in await maker.catalogue() if base.name == name)


async def test_it_is_made_once_for_all_who_ask(tmp_path: Path, made: set[str]) -> None:
    maker = Maker(tmp_path, made)
    await maker.recover()
    assert (await state_of(maker)).state == "missing"
    heard: list[str] = []
    waiting = [asyncio.create_task(maker.ensure(NAME, heard.append)) for _ in range(5)]
    asked = await maker.request(NAME)
    assert (asked.state, asked.on_request) == ("building", True)
    while len(heard) < 5:
        await asyncio.sleep(0)
    # Those who give up stop nothing.
    waiting[0].cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await waiting[0]
    assert (await state_of(maker)).progress == f"Making {NAME}"
    maker.may.set()
    assert await asyncio.gather(*waiting[1:]) == [NAME] * 4
    assert heard == [f"Making {NAME}"] * 5
    assert maker.attempts == [NAME]
    assert (await maker.request(NAME)).state == "ready"
    assert list(StatePaths(tmp_path).wanted_bases.iterdir()) == []
    with pytest.raises(ImageNotFound, match="code-interpreter"):
        await maker.request("code-cooker")


async def test_a_failure_is_told_and_tried_again_only_when_asked(
    tmp_path: Path, made: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bases, "_RETRY_SECONDS", 0.0)
    maker = Maker(tmp_path, made)
    maker.error = HostFull("The disk is full.")
    maker.may.set()
    with pytest.raises(HostFull):
        await maker.ensure(NAME, lambda _: None)
    for _ in range(10):
        await asyncio.sleep(0)
    failed = await state_of(maker)
    assert (failed.state, failed.error, maker.attempts) == ("failed", "The disk is full.", [NAME])
    # The next agent does not try by itself either.
    await Maker(tmp_path, made).recover()
    assert list(StatePaths(tmp_path).wanted_bases.iterdir()) == []
    maker.error = None
    assert (await maker.request(NAME)).state == "building"
    assert await maker.ensure(NAME, lambda _: None) == NAME
    assert maker.attempts == [NAME] * 2


async def test_what_was_asked_for_is_continued_by_the_next_agent(
    tmp_path: Path, made: set[str]
) -> None:
    first = Maker(tmp_path, made)
    await first.request(NAME)
    while not first.attempts:
        await asyncio.sleep(0)
    marker = StatePaths(tmp_path).wanted_bases / NAME
    async with asyncio.timeout(60):
        while not marker.exists():
            await asyncio.sleep(0.01)
    await first.close()
    assert marker.exists()
    second = Maker(tmp_path, made)
    await second.recover()
    second.may.set()
    assert await second.ensure(NAME, lambda _: None) == NAME
    assert second.attempts == [NAME]
    assert not marker.exists()


async def test_a_disk_that_cannot_be_read_keeps_no_agent_from_starting(
    tmp_path: Path, made: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    maker = Maker(tmp_path, made)
    with monkeypatch.context() as patch:
        patch.setattr(maker, "_is_wanted", MagicMock(side_effect=OSError(5, "I/O error")))
        await maker.recover()
    assert (await state_of(maker)).state == "missing"
    await maker.close()

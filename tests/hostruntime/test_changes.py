"""Who waits hears of every change once, or is told that something may be missing."""

from __future__ import annotations

import asyncio

from hostruntime.sandbox.changes import REMEMBERED, Changes, Heard


async def known(changes: Changes) -> Heard:
    """As one who asks for the first time: answered at once."""
    first = await changes.after("", 0, 60)
    assert not first.whole
    assert first.ids == ()
    return first


async def test_who_waits_is_told_at_once() -> None:
    changes = Changes()
    begun = await known(changes)
    waiting = asyncio.create_task(changes.after(begun.run, begun.seq, 60))
    await asyncio.sleep(0)
    assert not waiting.done()
    changes.note("a")
    assert await waiting == Heard(begun.run, 1, whole=True, ids=("a",))


async def test_nothing_that_came_in_between_is_lost() -> None:
    changes = Changes()
    run = (await known(changes)).run
    for name in ("a", "b", "c"):
        changes.note(name)
    assert (await changes.after(run, 0, 60)).ids == ("a", "b", "c")
    assert (await changes.after(run, 2, 60)).ids == ("c",)
    assert await changes.after(run, 3, 0) == Heard(run, 3, whole=True)


async def test_more_than_is_remembered_is_said_not_to_be_all() -> None:
    changes = Changes()
    run = (await known(changes)).run
    for number in range(REMEMBERED + 1):
        changes.note(str(number))
    assert await changes.after(run, 0, 60) == Heard(run, REMEMBERED + 1, whole=False)
    assert len((await changes.after(run, 1, 60)).ids) == REMEMBERED


async def test_numbers_of_another_run_mean_nothing() -> None:
    before, now = await known(Changes()), Changes()
    now.note("a")
    for seq in (0, 1, 7):
        assert not (await now.after(before.run, seq, 60)).whole
    assert not (await now.after((await known(now)).run, 7, 60)).whole


async def test_an_agent_that_goes_keeps_nobody_waiting() -> None:
    changes = Changes()
    begun = await known(changes)
    waiting = asyncio.create_task(changes.after(begun.run, begun.seq, 60))
    await asyncio.sleep(0)
    changes.close()
    assert await waiting == Heard(begun.run, 0, whole=True)

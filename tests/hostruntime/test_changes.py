"""Who waits hears of every change once, or is told that something may be missing."""

from __future__ import annotations

import asyncio

from hostruntime.sandbox.changes import HISTORY_LENGTH, Changes, ChangeSet


async def known(changes: Changes) -> ChangeSet:
    """As one who asks for the first time: answered at once."""
    first = await changes.after("", 0, 60)
    assert not first.complete
    assert first.ids == ()
    return first


async def test_who_waits_is_told_at_once() -> None:
    changes = Changes()
    begun = await known(changes)
    waiting = asyncio.create_task(changes.after(begun.run, begun.seq, 60))
    await asyncio.sleep(0)
    assert not waiting.done()
    changes.record("a")
    assert await waiting == ChangeSet(begun.run, 1, complete=True, ids=("a",))


async def test_nothing_that_came_in_between_is_lost() -> None:
    changes = Changes()
    run = (await known(changes)).run
    for name in ("a", "b", "c"):
        changes.record(name)
    assert (await changes.after(run, 0, 60)).ids == ("a", "b", "c")
    assert (await changes.after(run, 2, 60)).ids == ("c",)
    assert await changes.after(run, 3, 0) == ChangeSet(run, 3, complete=True)


async def test_more_than_is_remembered_is_said_not_to_be_all() -> None:
    changes = Changes()
    run = (await known(changes)).run
    for number in range(HISTORY_LENGTH + 1):
        changes.record(str(number))
    assert await changes.after(run, 0, 60) == ChangeSet(run, HISTORY_LENGTH + 1, complete=False)
    assert len((await changes.after(run, 1, 60)).ids) == HISTORY_LENGTH


async def test_numbers_of_another_run_mean_nothing() -> None:
    before, now = await known(Changes()), Changes()
    now.record("a")
    for seq in (0, 1, 7):
        assert not (await now.after(before.run, seq, 60)).complete
    assert not (await now.after((await known(now)).run, 7, 60)).complete


async def test_an_agent_that_goes_keeps_nobody_waiting() -> None:
    changes = Changes()
    begun = await known(changes)
    waiting = asyncio.create_task(changes.after(begun.run, begun.seq, 60))
    await asyncio.sleep(0)
    changes.close()
    assert await waiting == ChangeSet(begun.run, 0, complete=True)

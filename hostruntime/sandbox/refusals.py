"""Telling with the end of a command that failed what the network policy refused meanwhile.

Of one that somebody waits for with its last frame, of one in the background
(:mod:`hostruntime.sandbox.background`) from its end on.

What the sandbox was refused between the command's start and its end is in the egress record. Which
of its processes asked isn't: another command's request at the same time is told as well, and so
everybody who shows this says "while it ran". Commands that succeed cost no look.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import replace

from hostruntime.container.exec import Exited, Frame, TimedOut
from hostruntime.host.tasks import in_thread
from hostruntime.wire.commands import RefusedRequest
from hostruntime.wire.health import EgressDecision

# How many a command's last frame has.
MAX_REFUSED = 20
_log = logging.getLogger(__name__)

# What an owner was refused since a Unix time. It reads files, so it is called in a thread.
type Refusals = Callable[[str, float], Sequence[EgressDecision]]


async def with_refusals(
    frames: AsyncGenerator[Frame, None], owner: str, refusals: Refusals
) -> AsyncGenerator[Frame, None]:
    """The frames of a command that is about to start, the last one with what was refused."""
    # The record has milliseconds.
    began = int(time.time() * 1000) / 1000
    async with aclosing(frames):
        async for frame in frames:
            if isinstance(frame, TimedOut) or (isinstance(frame, Exited) and frame.code != 0):
                refused = await in_thread(refused_between, refusals, owner, began)
                yield replace(frame, refused=refused or ())
            else:
                yield frame


def refused_between(
    refusals: Refusals, owner: str, since: float, until: float = math.inf
) -> tuple[RefusedRequest, ...] | None:
    """What was refused between two Unix times, without repetitions; reads files.

    None if it can't be read, which must not fail the command.
    """
    try:
        found = [one for one in refusals(owner, since) if one.at <= until]
    except OSError as error:
        _log.error("cannot read what %s was refused: %s", owner, error)
        return None
    requests = (RefusedRequest(one.host, one.port, one.reason, one.direct) for one in found)
    return tuple(dict.fromkeys(requests))[:MAX_REFUSED]

"""Running a recipe's steps: one shell each, watched, and judged when it ends.

Steps share nothing but the file system.  When one has ended everything it left running is
killed, so that the next one, and the capture, find it still.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from hostruntime.build.output import OutputBudget, StepOutput
from hostruntime.build.plan import Emit, Host, Plan
from hostruntime.build.report import (
    MAX_REFUSED,
    NotReached,
    Refused,
    container_stopped,
    out_of_disk,
    out_of_memory,
    ran_past_build_time,
    ran_past_step_time,
    step_failed,
    went_without,
)
from hostruntime.container.exec import Chunk, Exited, Started, TimedOut, shell_argv
from hostruntime.errors import BuildFailed, ContainerGone, ExecKilled
from hostruntime.host.tasks import in_thread

STEP_DIRECTORY = "/root"
SILENCE_SECONDS: float = 60
_log = logging.getLogger(__name__)


class Silence:
    """Tells when nothing has been heard for a minute, and whenever that has lasted twice as long.

    ``tell`` gets the seconds.  For one event loop.
    """

    def __init__(self, tell: Callable[[float], None]) -> None:
        self._tell = tell
        self._loop = asyncio.get_running_loop()
        self._heard = self._loop.time()
        self._told: float = 0
        self._timer = self._loop.call_later(SILENCE_SECONDS, self._look)

    def heard(self) -> None:
        """Something was said: begin anew."""
        self._heard = self._loop.time()
        if self._told:
            self._told = 0
            self._timer.cancel()
            self._timer = self._loop.call_later(SILENCE_SECONDS, self._look)

    def stop(self) -> None:
        """Tell nothing any more."""
        self._timer.cancel()

    def _look(self) -> None:
        # Set when output was last told of, not at each piece of it, of which there are many.
        due = self._told * 2 or SILENCE_SECONDS
        if self._loop.time() >= self._heard + due:
            self._tell(due)
            self._told, due = due, due * 2
        self._timer = self._loop.call_at(self._heard + due, self._look)


@dataclass
class StepRunner:
    """Runs the steps of one build.

    ``remaining`` says how many seconds the build has left; ``environment`` takes the last step that
    was run, 0 before the first, and says what one that begins now has.
    """

    host: Host
    plan: Plan
    emit: Emit
    remaining: Callable[[], float]
    environment: Callable[[int], Awaitable[Mapping[str, str]]]
    last: int = 0
    _budget: OutputBudget = field(default_factory=OutputBudget)

    async def run(self, number: int) -> list[Refused]:
        """Run the step of that number, the first being 1; return what it was refused.

        Raises BuildFailed.
        """
        command, total = self.plan.recipe[number - 1], len(self.plan.recipe)
        self.emit("step_started", step=number, total=total, command=command)
        began, remaining = time.time(), self.remaining()
        used_bytes, used_files = await self._disk_used()
        output = StepOutput(lambda text: self.emit("output", step=number, text=text), self._budget)
        try:
            end = await self._execute(number, output, min(self.plan.step_timeout, remaining))
            await self.host.containers.kill_all_but_init(self.plan.image_id)
        except (ContainerGone, ExecKilled):
            raise container_stopped(number, total, command, output.tail()) from None
        finally:
            output.finish()
        refused = await self._asked_of_proxy(self.host.refusals, began)
        now_bytes, now_files = await self._disk_used()
        self.emit(
            "step_finished",
            step=number,
            exit_code=end.code if isinstance(end, Exited) else None,
            signal=end.signal if isinstance(end, Exited) else None,
            duration_ms=end.duration_ms,
            output_bytes=output.output_bytes,
            elided_bytes=output.elided_bytes,
            added_bytes=now_bytes - used_bytes,
            added_files=now_files - used_files,
            refused=[one.to_wire() for one in refused[:MAX_REFUSED]],
        )
        unreached = await self._asked_of_proxy(self.host.unreached, began)
        if isinstance(end, TimedOut):
            raise self._out_of_time(number, output.tail(), remaining, refused, unreached)
        if end.code != 0:
            raise await self._failed(number, output.tail(), end, refused, unreached)
        self._tell_missing(number, unreached)
        self.last = number
        return refused[:MAX_REFUSED]

    async def _disk_used(self) -> tuple[int, int]:
        return await in_thread(self.host.containers.disk_used, self.plan.image_id)

    def _tell_missing(self, number: int, unreached: Sequence[NotReached]) -> None:
        # Many a program asks DNS first, and then the proxy after all.
        if missing := [one for one in unreached if not one.direct]:
            self.emit("not_reached", step=number, message=went_without(missing))

    async def _asked_of_proxy[T](
        self, ask: Callable[[str, float], list[T]], began: float
    ) -> list[T]:
        """What the policy refused, however the step ended: `curl … | bash` succeeds with nothing.

        Or which allowed hosts were not reached.  Not knowing it is no failure of the step.
        """
        try:
            return await asyncio.to_thread(ask, self.plan.image_id, began)
        except OSError as error:
            _log.error("what %s was refused cannot be read: %s", self.plan.image_id, error)
            return []

    async def _execute(self, number: int, output: StepOutput, limit: float) -> Exited | TimedOut:
        frames = self.host.containers.exec(
            self.plan.image_id,
            shell_argv(self.plan.recipe[number - 1]),
            cwd=STEP_DIRECTORY,
            env=await self.environment(self.last),
            timeout=limit,
            merge_output=True,
        )
        silence = Silence(lambda seconds: self.emit("step_silent", step=number, seconds=seconds))
        try:
            async with aclosing(frames) as stream:
                async for frame in stream:
                    if isinstance(frame, Chunk):
                        silence.heard()
                        output.feed(frame.data)
                    elif not isinstance(frame, Started):
                        return frame
        finally:
            silence.stop()
        raise ContainerGone("The step's command went away without a word.")

    def _out_of_time(
        self,
        number: int,
        tail: str,
        remaining: float,
        refused: Sequence[Refused],
        unreached: Sequence[NotReached],
    ) -> BuildFailed:
        plan = self.plan
        step = (number, len(plan.recipe), plan.recipe[number - 1], tail)
        if plan.step_timeout <= remaining:
            return ran_past_step_time(*step, plan.step_timeout, refused, unreached)
        return ran_past_build_time(plan.build_timeout, *step, refused, unreached)

    async def _failed(
        self,
        number: int,
        tail: str,
        end: Exited,
        refused: Sequence[Refused],
        unreached: Sequence[NotReached],
    ) -> BuildFailed:
        plan = self.plan
        command, total = plan.recipe[number - 1], len(plan.recipe)
        if end.out_of_memory:
            return out_of_memory(number, total, command, tail, plan.limits.memory_mb)
        if await in_thread(self.host.containers.disk_is_full, plan.image_id):
            return out_of_disk(number, total, command, tail, plan.limits.disk_size_mb)
        return step_failed(number, total, command, tail, end, refused, unreached)

"""Run a recipe's steps, each in its own shell, and report the results.

Steps share nothing but the file system. When one has finished, everything it left running is
killed, so that nothing changes during the next step or the capture.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from hostruntime.build.output import OutputBudget, StepOutput
from hostruntime.build.plan import Emit, Host, Plan
from hostruntime.build.report import (
    MAX_REFUSED,
    RefusedHost,
    UnreachedNotice,
    build_timed_out,
    container_stopped,
    out_of_disk,
    out_of_memory,
    step_failed,
    step_timed_out,
    unreached_message,
)
from hostruntime.container.exec import Chunk, Exited, Started, TimedOut, shell_argv
from hostruntime.errors import BuildFailed, ContainerGone, ExecKilled
from hostruntime.host.tasks import in_thread

STEP_DIRECTORY = "/root"
SILENCE_SECONDS: float = 60
_log = logging.getLogger(__name__)


class SilenceTimer:
    """Warns after a minute without output, then at doubling intervals.

    ``notify`` gets the seconds of silence. For use in one event loop.
    """

    def __init__(self, notify: Callable[[float], None]) -> None:
        self._notify = notify
        self._loop = asyncio.get_running_loop()
        self._last_output = self._loop.time()
        self._reported: float = 0
        self._timer = self._loop.call_later(SILENCE_SECONDS, self._check)

    def reset(self) -> None:
        """Restart the timer after output."""
        self._last_output = self._loop.time()
        if self._reported:
            self._reported = 0
            self._timer.cancel()
            self._timer = self._loop.call_later(SILENCE_SECONDS, self._check)

    def stop(self) -> None:
        """Stop the timer."""
        self._timer.cancel()

    def _check(self) -> None:
        # Rescheduled here, not for each chunk of output, of which there are many.
        due = self._reported * 2 or SILENCE_SECONDS
        if self._loop.time() >= self._last_output + due:
            self._notify(due)
            self._reported, due = due, due * 2
        self._timer = self._loop.call_at(self._last_output + due, self._check)


@dataclass
class StepRunner:
    """Runs the steps of one build.

    ``remaining`` returns how many seconds the build has left; ``environment`` takes the number of
    the last step that was run (0 before the first) and returns the next step's environment.
    """

    host: Host
    plan: Plan
    emit: Emit
    remaining: Callable[[], float]
    environment: Callable[[int], Mapping[str, str]]
    last_step: int = 0
    _budget: OutputBudget = field(default_factory=OutputBudget)

    async def run(self, number: int) -> list[RefusedHost]:
        """Run a step, counted from 1; return the hosts it was refused.

        Raises BuildFailed.
        """
        command, total = self.plan.recipe[number - 1], len(self.plan.recipe)
        self.emit("step_started", step=number, total=total, command=command)
        started_at, remaining = time.time(), self.remaining()
        used_bytes, used_files = await self._disk_used()
        output = StepOutput(lambda text: self.emit("output", step=number, text=text), self._budget)
        try:
            end = await self._execute(number, output, min(self.plan.step_timeout, remaining))
            await self.host.containers.kill_all_but_init(self.plan.image_id)
        except (ContainerGone, ExecKilled):
            raise container_stopped(number, total, command, output.tail()) from None
        finally:
            output.finish()
        refused = await self._query_proxy(self.host.refusals, started_at)
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
            refused=[host.to_wire() for host in refused[:MAX_REFUSED]],
        )
        unreached = await self._query_proxy(self.host.unreached, started_at)
        if isinstance(end, TimedOut):
            raise self._timeout_error(number, output.tail(), remaining, refused, unreached)
        if end.code != 0:
            raise await self._step_error(number, output.tail(), end, refused, unreached)
        self._report_unreached(number, unreached)
        self.last_step = number
        return refused[:MAX_REFUSED]

    async def _disk_used(self) -> tuple[int, int]:
        return await in_thread(self.host.containers.disk_used, self.plan.image_id)

    def _report_unreached(self, number: int, unreached: Sequence[UnreachedNotice]) -> None:
        # Many programs try DNS first and then use the proxy after all.
        if missing := [notice for notice in unreached if not notice.direct]:
            self.emit("not_reached", step=number, message=unreached_message(missing))

    async def _query_proxy[T](
        self, query: Callable[[str, float], list[T]], started_at: float
    ) -> list[T]:
        """Query refused or unreached hosts, even for a successful step.

        `curl … | bash` succeeds even if nothing was downloaded. A failed query does not fail the
        step.
        """
        try:
            return await asyncio.to_thread(query, self.plan.image_id, started_at)
        except OSError as error:
            _log.error("cannot read the proxy's decisions on %s: %s", self.plan.image_id, error)
            return []

    async def _execute(self, number: int, output: StepOutput, limit: float) -> Exited | TimedOut:
        frames = self.host.containers.exec(
            self.plan.image_id,
            shell_argv(self.plan.recipe[number - 1]),
            cwd=STEP_DIRECTORY,
            env=self.environment(self.last_step),
            timeout=limit,
            merge_output=True,
        )
        silence = SilenceTimer(
            lambda seconds: self.emit("step_silent", step=number, seconds=seconds)
        )
        try:
            async with aclosing(frames) as stream:
                async for frame in stream:
                    if isinstance(frame, Chunk):
                        silence.reset()
                        output.feed(frame.data)
                    elif not isinstance(frame, Started):
                        return frame
        finally:
            silence.stop()
        raise ContainerGone("The step's command disappeared without an exit status.")

    def _timeout_error(
        self,
        number: int,
        tail: str,
        remaining: float,
        refused: Sequence[RefusedHost],
        unreached: Sequence[UnreachedNotice],
    ) -> BuildFailed:
        plan = self.plan
        step = (number, len(plan.recipe), plan.recipe[number - 1], tail)
        if plan.step_timeout <= remaining:
            return step_timed_out(*step, plan.step_timeout, refused, unreached)
        return build_timed_out(plan.build_timeout, *step, refused, unreached)

    async def _step_error(
        self,
        number: int,
        tail: str,
        end: Exited,
        refused: Sequence[RefusedHost],
        unreached: Sequence[UnreachedNotice],
    ) -> BuildFailed:
        plan = self.plan
        command, total = plan.recipe[number - 1], len(plan.recipe)
        if end.out_of_memory:
            return out_of_memory(number, total, command, tail, plan.limits.memory_mb)
        if await in_thread(self.host.containers.disk_is_full, plan.image_id):
            return out_of_disk(number, total, command, tail, plan.limits.disk_size_mb)
        return step_failed(number, total, command, tail, end, refused, unreached)

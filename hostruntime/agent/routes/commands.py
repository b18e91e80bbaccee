"""Commands in a sandbox."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from hostruntime.agent.requests import path_parameter, read_message
from hostruntime.agent.responses import NdjsonResponse, ndjson_line, respond
from hostruntime.container.exec import Chunk, Exited, Frame, Started, TimedOut
from hostruntime.errors import ExecTimeout, HostError
from hostruntime.sandbox.manager import SandboxManager
from hostruntime.wire.commands import Exec, ExecFrame, RunningCommands

_TIMED_OUT = "The command ran past its timeout and was killed, with everything it had started."


def routes(sandboxes: SandboxManager) -> list[Route]:
    """The routes, over a host's sandboxes."""

    async def run(request: Request) -> Response:
        """An error before the command runs is an error response, later an error line."""
        message = await read_message(request, Exec)
        frames = sandboxes.exec(path_parameter(request), message)
        started = await anext(frames)
        return NdjsonResponse(_lines(started, frames, message.max_output_bytes))

    async def running(_: Request) -> Response:
        return respond(RunningCommands(sandboxes.commands.by_scope()))

    return [
        Route("/sandboxes/{id}/exec", run, methods=["POST"]),
        Route("/commands", running),
    ]


async def _lines(
    started: Frame, frames: AsyncGenerator[Frame, None], remaining: int | None
) -> AsyncGenerator[bytes, None]:
    truncated = False
    async with aclosing(frames):
        yield ndjson_line(_frame(started))
        try:
            async for frame in frames:
                if isinstance(frame, Chunk) and remaining is not None:
                    truncated = truncated or len(frame.data) > remaining
                    frame = Chunk(frame.stream, frame.data[:remaining])
                    remaining -= len(frame.data)
                    if not frame.data:
                        continue
                wire_frame = _frame(frame)
                yield ndjson_line(
                    replace(wire_frame, truncated=truncated) if wire_frame.is_last else wire_frame
                )
        except HostError as error:
            yield ndjson_line(
                ExecFrame(
                    "error",
                    error_code=error.code,
                    message=str(error),
                    signal=error.extra.get("signal"),
                )
            )


def _frame(frame: Frame) -> ExecFrame:
    match frame:
        case Started():
            return ExecFrame("started", pid=frame.pid)
        case Chunk():
            return ExecFrame("chunk", stream=frame.stream, data=frame.data)
        case Exited():
            return ExecFrame(
                "exited",
                code=frame.code,
                signal=frame.signal,
                duration_ms=frame.duration_ms,
                out_of_memory=frame.out_of_memory,
                refused=frame.refused,
            )
        case TimedOut():
            return ExecFrame(
                "error",
                error_code=ExecTimeout.code,
                message=_TIMED_OUT,
                duration_ms=frame.duration_ms,
                refused=frame.refused,
            )

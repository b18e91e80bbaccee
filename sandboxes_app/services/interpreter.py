"""Running code in a sandbox's kernels. The host has them, and their contexts; there are no rows."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, cast

from hostruntime import errors as host_errors
from hostruntime.client.host_client import HostClient
from hostruntime.wire.interpreter import CodeError, CodeFrame, ContextInfo, CreateContext, RunCode
from orkestr_console.accounts.actor import READ, WRITE, Actor
from orkestr_console.accounts.audit import audited
from orkestr_console.core.errors import DomainError, HostUnavailable, NotFound
from orkestr_console.core.hosts import Steps, ask, async_host, in_steps, translate_error
from orkestr_console.core.ids import new_id
from orkestr_console.http.closing import cut_off_reason
from orkestr_console.http.threads import in_thread
from sandboxes_app.models import Sandbox
from sandboxes_app.services.background import find_existing
from sandboxes_app.services.code_frames import code_failure, code_frame
from sandboxes_app.services.commands import (
    CommandStream,
    command_quota,
    record_abandoned,
    too_many_commands,
)
from sandboxes_app.services.exec_errors import translate_exec_error
from sandboxes_app.services.lifecycle import settle_if_missing
from sandboxes_app.services.waking import find_awake, translate_paused
from sandboxes_app.specs import CodeSpec, ContextSpec

ACTION = "sandbox.run_code"
CONTEXT_NOT_FOUND = "The sandbox has no such context; check the id, or create one."
CONTEXT_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", re.ASCII)


@dataclass(frozen=True)
class CodeRun:
    """Code that may be run: for whom, where, and the host's request for it."""

    actor: Actor
    sandbox: Sandbox
    request: RunCode


@dataclass(frozen=True)
class CodeAnswer:
    """What came of a run: its outputs in their order, and its last frame."""

    frames: Sequence[CodeFrame]
    last: CodeFrame

    def printed(self, stream: str) -> str:
        """What was written to stdout or stderr."""
        return "".join(each.text for each in self.frames if each.stream == stream)

    @property
    def error(self) -> CodeError | None:
        """The exception that the code raised, or why its context was lost."""
        errors = [each.error for each in self.frames if each.error is not None]
        return errors[-1] if errors else None


type CodeOutcome = CodeAnswer | host_errors.HostError


def code_note(answer: CodeAnswer, _: Any) -> dict[str, Any]:
    """The audit log's details: not the code, which may contain secrets."""
    return {"context": answer.last.context_id, "duration_ms": answer.last.duration_ms}


@audited(ACTION, "sandbox")
def prepare_code(actor: Actor, sandbox_id: str, spec: CodeSpec) -> CodeRun:
    """The first part of running code, which reads rows.

    Raises ``NotFound`` (also for the context), ``Conflict`` (not running, no kernel for the
    language, the context is busy), ``RateLimited`` when as many of the team's commands run as may.
    """
    return admit(actor, sandbox_id, spec)


def admit(actor: Actor, sandbox_id: str, spec: CodeSpec) -> CodeRun:
    """:func:`prepare_code`, unrecorded."""
    actor.require(WRITE)
    sandbox = find_awake(actor, sandbox_id)
    request = RunCode(
        spec.code,
        language=spec.language,
        context_id=spec.context_id,
        timeout_seconds=spec.timeout_seconds,
        quota=command_quota(actor),
    )
    return CodeRun(actor, sandbox, request)


async def run_code(run: CodeRun) -> CodeOutcome:
    """The second part, on the event loop: it holds neither a thread nor a database connection.

    Returns the host's errors. If it is cancelled, the code is interrupted, which is recorded.
    """
    try:
        async with aclosing(host_frames(run)) as frames:
            collected = [frame async for frame in frames]
    except host_errors.HostError as error:
        return error
    except asyncio.CancelledError:
        await asyncio.shield(record_left(run, cut_off_reason()))
        raise
    if not collected or collected[-1].kind != "done":
        return host_errors.HostUnavailable("The host ended the stream before the code had ended.")
    return CodeAnswer(collected[1:-1], collected[-1])


def conclude_code(run: CodeRun, outcome: CodeOutcome) -> CodeAnswer:
    """The last part, which records the outcome. Raises like :func:`prepare_code`."""
    return _conclude(run.actor, run.sandbox.pk, run, outcome)


@audited(ACTION, "sandbox", note=code_note, behind=True)
def _conclude(_: Actor, __: str, run: CodeRun, outcome: CodeOutcome) -> CodeAnswer:
    if isinstance(outcome, host_errors.HostError):
        raise code_error(run, outcome) from outcome
    return outcome


@audited(ACTION, "sandbox", note=lambda *_: {"stream": True})
def code_stream(actor: Actor, sandbox_id: str, spec: CodeSpec) -> CodeStream:
    """Run code; the frames of the wire contract as they arrive.

    Closing it early interrupts the code. Raises like :func:`prepare_code`, but only immediately or
    before the first frame.
    """
    return CodeStream.of_run(admit(actor, sandbox_id, spec))


class CodeStream(CommandStream):
    """The frames of a run. Closing it interrupts the code, and records why."""

    @classmethod
    def of_run(cls, run: CodeRun) -> CodeStream:
        """The stream of a run that starts when its first frame is requested."""
        stream = cls(wire_frames(run))
        stream._frames = recording_leaving(run, stream._frames, stream)
        return stream

    def error_frame(self, code: str, detail: str) -> dict[str, Any]:
        """The frame that ends the stream with an error of the service's."""
        return code_failure(code, detail)


async def recording_leaving(
    run: CodeRun, frames: AsyncGenerator[dict[str, Any]], stream: CodeStream
) -> AsyncGenerator[dict[str, Any]]:
    """The frames; records it, and why, if nobody waited for the last of them."""
    finished = False
    try:
        async with aclosing(frames):
            async for frame in frames:
                finished = frame["kind"] == "done" or "error_code" in frame
                yield frame
    except (GeneratorExit, asyncio.CancelledError):
        if not finished:
            await asyncio.shield(record_left(run, stream.close_reason or cut_off_reason()))
        raise


async def record_left(run: CodeRun, reason: str) -> None:
    """Record in the audit log that code was interrupted because nobody waits for it."""
    await in_thread(record_abandoned, run.actor, run.sandbox, reason, ACTION)


async def wire_frames(run: CodeRun) -> AsyncGenerator[dict[str, Any]]:
    """The frames of the wire contract of a run, which starts when the first is requested."""
    begun, error = False, None
    try:
        async with aclosing(host_frames(run)) as frames:
            async for frame in frames:
                begun = True
                error = frame.error or error
                yield code_frame(frame, error)
    except host_errors.HostError as failure:
        domain = await in_thread(code_error, run, failure)
        if not begun:
            raise domain from failure
        yield code_failure(domain.code, domain.detail)


def host_frames(run: CodeRun) -> AsyncGenerator[CodeFrame]:
    """The host's frames. An async generator, whatever the client calls it."""
    frames = async_host().code_frames(run.sandbox.pk, run.request)
    return cast("AsyncGenerator[CodeFrame]", frames)


def code_error(run: CodeRun, error: host_errors.HostError) -> DomainError:
    """The domain error for code that was not run, or not to its end; corrects the row."""
    if isinstance(error, host_errors.TooManyCommands):
        return too_many_commands(run.actor, error)
    if isinstance(error, host_errors.ContextNotFound):
        return NotFound(error.detail, code=error.code)
    if isinstance(error, host_errors.HostUnavailable):
        return HostUnavailable(
            "The host ended the run; it may have been interrupted. The context keeps its variables."
        )
    return translate_paused(run.actor, run.sandbox, error) or translate_exec_error(
        run.sandbox, error
    )


# Contexts ----------------------------------------------------------------------------------------


@in_steps
@audited("context.create", "sandbox", note=lambda info, _: {"context": info.id})
def create_context(actor: Actor, sandbox_id: str, spec: ContextSpec) -> Steps[ContextInfo]:
    """Start a kernel in a context of its own.

    Raises ``NotFound``, ``Conflict`` (not running, no kernel for the language, as many contexts as
    may be), ``InvalidInput`` for a working directory that does not exist.
    """
    actor.require(WRITE)
    sandbox = yield from find_awake.steps(actor, sandbox_id)
    request = CreateContext(new_id("ctx"), language=spec.language, cwd=spec.cwd)
    asked = ask(HostClient.create_context, sandbox.pk, request)
    return (yield from answer(actor, sandbox, asked))


@in_steps
def list_contexts(actor: Actor, sandbox_id: str) -> Steps[list[ContextInfo]]:
    """A sandbox's contexts, the newest first, also while it is paused.

    Raises ``NotFound``, ``Conflict`` (the sandbox has ended).
    """
    actor.require(READ)
    sandbox = yield from find_existing(actor, sandbox_id)
    return (yield from answer(actor, sandbox, ask(HostClient.contexts, sandbox.pk)))


@in_steps
@audited("context.restart", "sandbox", note=lambda info, _: {"context": info.id})
def restart_context(actor: Actor, sandbox_id: str, context_id: str) -> Steps[ContextInfo]:
    """Give a context a new kernel; what runs in it ends. Raises like :func:`create_context`."""
    actor.require(WRITE)
    sandbox = yield from find_awake.steps(actor, sandbox_id)
    asked = ask(HostClient.restart_context, sandbox.pk, usable_id(context_id))
    return (yield from answer(actor, sandbox, asked))


@in_steps
@audited("context.remove", "sandbox", note=lambda _, context_id: {"context": context_id})
def remove_context(actor: Actor, sandbox_id: str, context_id: str) -> Steps[None]:
    """End a context, with all that it has started. Raises like :func:`create_context`."""
    actor.require(WRITE)
    sandbox = yield from find_awake.steps(actor, sandbox_id)
    asked = ask(HostClient.remove_context, sandbox.pk, usable_id(context_id))
    yield from answer(actor, sandbox, asked)


def usable_id(context_id: str) -> str:
    """An id that can be one. Raises ``NotFound``."""
    if CONTEXT_ID.fullmatch(context_id) is None:
        raise NotFound(CONTEXT_NOT_FOUND, code="context_not_found")
    return context_id


def answer[R](actor: Actor, sandbox: Sandbox, call: Steps[R]) -> Steps[R]:
    """The host's answer about a sandbox's contexts; translates its errors, and corrects the row."""
    try:
        return (yield from call)
    except host_errors.ContextNotFound as error:
        raise NotFound(error.detail, code=error.code) from error
    except (host_errors.ContainerGone, host_errors.NotFound) as error:
        yield from settle_if_missing.steps(sandbox)
        raise translate_error(host_errors.ContainerGone(error.detail)) from error
    except host_errors.HostError as error:
        raise translate_paused(actor, sandbox, error) or translate_error(error) from error

"""The agent's routes: each reads its request, calls one manager, renders the answer."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AsyncExitStack, aclosing
from dataclasses import asdict
from typing import Any

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from hostruntime.agent.bodies import (
    CollectedBody,
    DeadlineBody,
    ExecBody,
    MkdirBody,
    MoveBody,
    SandboxBody,
    read_body,
)
from hostruntime.agent.host import Host
from hostruntime.agent.keeping import Keeping
from hostruntime.agent.responses import (
    NdjsonResponse,
    defect,
    disk_error,
    gone_away,
    host_error,
    line,
)
from hostruntime.agent.routes_images import image_routes
from hostruntime.agent.routes_keeping import keeping_routes
from hostruntime.agent.routes_snapshots import snapshot_routes
from hostruntime.container.exec import Chunk, Exited, Frame, Started, TimedOut
from hostruntime.errors import HostError, InvalidRequest
from hostruntime.host.installation import InstallationBook
from hostruntime.network.egress import default_domains

_LONGEST_WAIT_SECONDS = 60.0


def application(host: Host) -> Starlette:
    """The agent's ASGI application."""
    images = image_routes(host.store, host.bases, host.builds)
    keeping = Keeping(InstallationBook(host.paths), host.store, host.sandboxes.snapshots)
    snapshots = snapshot_routes(host.sandboxes)
    routes = [*images, *snapshots, *keeping_routes(keeping), *_routes()]
    handlers = {
        HostError: host_error,
        OSError: disk_error,
        ClientDisconnect: gone_away,
        Exception: defect,
    }
    app = Starlette(routes=routes, exception_handlers=handlers)
    app.state.host = host
    return app


def _routes() -> list[Route]:
    sandbox, files = "/sandboxes/{id}", "/sandboxes/{id}/files"
    return [
        Route("/health", health),
        Route("/egress/defaults", egress_defaults),
        Route("/egress/decisions", egress_decisions),
        Route("/egress/hosts", egress_hosts),
        Route("/usage", usage),
        Route("/usage/collected", usage_collected, methods=["POST"]),
        Route("/commands", running_commands),
        Route("/changes", changed_sandboxes),
        Route("/sandboxes", list_sandboxes),
        Route("/sandboxes", create_sandbox, methods=["POST"]),
        Route(sandbox, get_sandbox),
        Route(sandbox, patch_sandbox, methods=["PATCH"]),
        Route(sandbox, delete_sandbox, methods=["DELETE"]),
        Route(f"{sandbox}/pause", pause_sandbox, methods=["POST"]),
        Route(f"{sandbox}/resume", resume_sandbox, methods=["POST"]),
        Route(f"{sandbox}/exec", exec_in_sandbox, methods=["POST"]),
        Route(files, read_file),
        Route(files, write_file, methods=["PUT"]),
        Route(files, delete_file, methods=["DELETE"]),
        Route(f"{files}/mkdir", make_directory, methods=["POST"]),
        Route(f"{files}/move", move_file, methods=["POST"]),
        Route(f"{files}/stat", stat_file),
    ]


def _host(request: Request) -> Host:
    host = request.app.state.host
    assert isinstance(host, Host)
    return host


def _id(request: Request) -> str:
    return str(request.path_params["id"])


# The host --------------------------------------------------------------------------------------


async def health(request: Request) -> Response:
    """What the agent is and how it is."""
    return JSONResponse(await asyncio.to_thread(_host(request).health))


async def egress_defaults(request: Request) -> Response:
    """The default allowlist."""
    domains = await asyncio.to_thread(default_domains, _host(request).paths)
    return JSONResponse({"domains": domains})


async def egress_decisions(request: Request) -> Response:
    """What the proxy decided for one owner."""
    owner = _parameter(request, "owner")
    since = _number(request, "since", 0.0)
    found = await asyncio.to_thread(_host(request).proxy.decisions, owner, since)
    return JSONResponse({"decisions": [asdict(decision) for decision in found]})


async def egress_hosts(request: Request) -> Response:
    """What one owner did with each host."""
    found = await asyncio.to_thread(_host(request).proxy.hosts, _parameter(request, "owner"))
    return JSONResponse({"hosts": [asdict(use) for use in found]})


# Usage -----------------------------------------------------------------------------------------


async def usage(request: Request) -> Response:
    """What sandboxes have used, ended ones until that is collected; ``id`` asks for one."""
    meters = _host(request).sandboxes.usage.list(request.query_params.get("id"))
    return JSONResponse({"sandboxes": [meter.to_wire() for meter in meters]})


async def usage_collected(request: Request) -> Response:
    """Forget the ended sandboxes among those named; the others go on."""
    body = await read_body(request, CollectedBody)
    await _host(request).sandboxes.usage.collected(body.ids)
    return Response(status_code=204)


# Sandboxes -------------------------------------------------------------------------------------


async def list_sandboxes(request: Request) -> Response:
    """Every sandbox."""
    sandboxes = _host(request).sandboxes.list()
    to_wire = _host(request).sandboxes.to_wire
    return JSONResponse({"sandboxes": [to_wire(sandbox) for sandbox in sandboxes]})


async def changed_sandboxes(request: Request) -> Response:
    """Those that ended, or were paused or resumed, after a number; waits a while for one."""
    sandboxes = _host(request).sandboxes
    run, seq = request.query_params.get("run", ""), int(_number(request, "after", 0))
    seconds = min(max(_number(request, "seconds", 0.0), 0.0), _LONGEST_WAIT_SECONDS)
    heard = await sandboxes.changes.after(run, seq, seconds)
    # One that was deleted meanwhile is known to have ended.
    found = [one for one in sandboxes.list() if one.request.id in set(heard.ids)]
    told = {"run": heard.run, "seq": heard.seq, "whole": heard.whole}
    return JSONResponse({**told, "sandboxes": [sandboxes.to_wire(one) for one in found]})


async def create_sandbox(request: Request) -> Response:
    """Start a sandbox, once for an id."""
    body = await read_body(request, SandboxBody)
    sandbox, new = await _host(request).sandboxes.create(body.request())
    return JSONResponse(sandbox.to_wire(), 201 if new else 200)


async def get_sandbox(request: Request) -> Response:
    """One sandbox."""
    sandboxes = _host(request).sandboxes
    return JSONResponse(sandboxes.to_wire(sandboxes.get(_id(request))))


async def patch_sandbox(request: Request) -> Response:
    """Change when a sandbox ends."""
    body = await read_body(request, DeadlineBody)
    sandbox = await _host(request).sandboxes.set_deadline(_id(request), body.deadline)
    return JSONResponse(sandbox.to_wire())


async def pause_sandbox(request: Request) -> Response:
    """Freeze a sandbox, until another moment at the latest."""
    body = await read_body(request, DeadlineBody)
    sandbox = await _host(request).sandboxes.pause(_id(request), body.deadline)
    return JSONResponse(sandbox.to_wire())


async def resume_sandbox(request: Request) -> Response:
    """Let a frozen sandbox run on, until another moment."""
    body = await read_body(request, DeadlineBody)
    sandbox = await _host(request).sandboxes.resume(_id(request), body.deadline)
    return JSONResponse(sandbox.to_wire())


async def delete_sandbox(request: Request) -> Response:
    """End a sandbox and forget it."""
    await _host(request).sandboxes.terminate(_id(request))
    return Response(status_code=204)


async def exec_in_sandbox(request: Request) -> Response:
    """Run a command; what is wrong before it runs is an error answer, later an error line."""
    body = await read_body(request, ExecBody)
    frames = _host(request).sandboxes.exec(
        _id(request),
        body.words(),
        cwd=body.cwd,
        env=body.env,
        timeout=body.timeout_seconds,
        quota=body.of_scope(),
    )
    started = await anext(frames)
    return NdjsonResponse(_exec_lines(started, frames, body))


async def _exec_lines(
    started: Frame, frames: AsyncGenerator[Frame, None], body: ExecBody
) -> AsyncGenerator[bytes, None]:
    left, truncated = body.max_output_bytes, False
    async with aclosing(frames):
        yield line(_frame(started))
        try:
            async for frame in frames:
                if isinstance(frame, Chunk) and left is not None:
                    truncated = truncated or len(frame.data) > left
                    frame = Chunk(frame.stream, frame.data[:left])
                    left -= len(frame.data)
                    if not frame.data:
                        continue
                record = _frame(frame)
                yield line(record | ({"truncated": truncated} if "code" in record else {}))
        except HostError as error:
            yield line({"kind": "error", **error.extra, "code": error.code, "message": str(error)})


def _frame(frame: Frame) -> dict[str, Any]:
    match frame:
        case Started():
            return {"kind": "started", "pid": frame.pid}
        case Chunk():
            data = base64.b64encode(frame.data).decode()
            return {"kind": "chunk", "stream": frame.stream, "data": data}
        case Exited():
            return {"kind": "exited", **asdict(frame)}
        case TimedOut():
            message = (
                "The command ran past its timeout and was killed, with everything it had started."
            )
            return {"kind": "error", "code": "exec_timeout", "message": message, **asdict(frame)}


async def running_commands(request: Request) -> Response:
    """How many commands run of each scope that has any."""
    return JSONResponse({"scopes": _host(request).sandboxes.commands.by_scope()})


# Files -----------------------------------------------------------------------------------------


async def read_file(request: Request) -> Response:
    """A file's bytes, or a directory's entries; ``X-File-*`` say what it is."""
    host = _host(request)
    name, path = host.sandboxes.container_name(_id(request)), _parameter(request, "path")
    cap = int(_number(request, "max_bytes", -1))
    directories = request.query_params.get("directories", "true") == "true"
    stack = AsyncExitStack()
    try:
        opened = await stack.enter_async_context(
            host.containers.files.read(
                name, path, max_bytes=cap if cap >= 0 else None, directories=directories
            )
        )
        if opened.entries is None:
            kept = stack.pop_all()
            return _FileResponse(opened.content, kept, _stat_headers(opened.stat))
        return JSONResponse({"entries": opened.entries}, headers=_stat_headers(opened.stat))
    finally:
        await stack.aclose()


class _FileResponse(StreamingResponse):
    """A file on its way; what it was opened with is closed whichever way the sending ends."""

    def __init__(
        self, content: AsyncIterator[bytes], stack: AsyncExitStack, headers: dict[str, str]
    ) -> None:
        super().__init__(content, media_type="application/octet-stream", headers=headers)
        self._stack = stack

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async with self._stack:
            await super().__call__(scope, receive, send)


def _stat_headers(stat: dict[str, Any]) -> dict[str, str]:
    return {
        "X-File-Type": "directory" if stat["is_dir"] else "file",
        "X-File-Size": str(stat["size"]),
        "X-File-Mode": f"{stat['mode']:o}",
        "X-File-Modified-At": repr(stat["modified_at"]),
    }


async def write_file(request: Request) -> Response:
    """Write the body to a path, whole or not at all."""
    host = _host(request)
    name, path = host.sandboxes.container_name(_id(request)), _parameter(request, "path")
    size = await host.containers.files.write(name, path, request.stream(), mode=_mode(request))
    return JSONResponse({"path": path, "size": size})


def _mode(request: Request) -> int | None:
    text = request.query_params.get("mode")
    if text is None:
        return None
    try:
        mode = int(text, 8)
    except ValueError:
        mode = -1
    if not 0 <= mode <= 0o7777:
        raise InvalidRequest(
            f"{text!r} is not a file mode; give octal permission bits such as 644."
        )
    return mode


async def delete_file(request: Request) -> Response:
    """Delete a file or a directory."""
    host = _host(request)
    name = host.sandboxes.container_name(_id(request))
    await host.containers.files.delete(name, _parameter(request, "path"))
    return Response(status_code=204)


async def make_directory(request: Request) -> Response:
    """Make a directory."""
    host, body = _host(request), await read_body(request, MkdirBody)
    name = host.sandboxes.container_name(_id(request))
    await host.containers.files.mkdir(name, body.path, parents=body.parents)
    return JSONResponse({"path": body.path})


async def move_file(request: Request) -> Response:
    """Rename."""
    host, body = _host(request), await read_body(request, MoveBody)
    name = host.sandboxes.container_name(_id(request))
    await host.containers.files.move(name, body.source, body.destination)
    return JSONResponse({"path": body.destination})


async def stat_file(request: Request) -> Response:
    """What is at a path."""
    host = _host(request)
    name = host.sandboxes.container_name(_id(request))
    return JSONResponse(await host.containers.files.stat(name, _parameter(request, "path")))


# Parameters ------------------------------------------------------------------------------------


def _parameter(request: Request, name: str) -> str:
    value = request.query_params.get(name)
    if not value:
        raise InvalidRequest(f"The parameter {name} is missing.")
    return value


def _number(request: Request, name: str, default: float) -> float:
    text = request.query_params.get(name)
    try:
        return default if text is None else float(text)
    except ValueError:
        raise InvalidRequest(f"The parameter {name} must be a number, not {text!r}.") from None

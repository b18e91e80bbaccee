"""The agent's routes for bases, images and builds: requests in, the parts' answers out.

Handlers raise :mod:`hostruntime.errors`; the agent's application turns those into answers.  Once
a stream has begun an error can only be a line in it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from dataclasses import asdict
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from hostruntime.build.bases import BASES, BaseBuilder
from hostruntime.build.log import KEEP_ALIVE_SECONDS
from hostruntime.build.manager import BuildManager, BuildRequest
from hostruntime.build.plan import Cache
from hostruntime.errors import HostError, HostFault, ImageNotFound, InvalidRequest
from hostruntime.host.tasks import in_thread
from hostruntime.image.environment import check_environment
from hostruntime.image.store import ALIASES, Image, ImageStore

_NDJSON = "application/x-ndjson"
_MAX_STEPS = 100
_MAX_STEP_BYTES = 256 * 1024


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _Limits(_Body):
    cpu: float = Field(default=2.0, gt=0, le=64)
    memory_mb: int = Field(default=4096, ge=64, le=1_048_576)
    disk_mb: int | None = Field(default=None, ge=16, le=1_048_576)


class _Cache(_Body):
    scope: str
    reuse: bool = False


class _BuildBody(_Body):
    id: str
    base_image: str
    recipe: tuple[str, ...] = Field(min_length=1, max_length=_MAX_STEPS)
    network: str
    allow_domains: tuple[str, ...] | None = None
    limits: _Limits = _Limits()
    step_timeout_seconds: float = Field(default=600.0, gt=0)
    build_timeout_seconds: float = Field(default=1800.0, gt=0)
    cache: _Cache | None = None
    env: dict[str, str] = {}


def image_routes(store: ImageStore, bases: BaseBuilder, builds: BuildManager) -> list[Route]:
    """The routes of the contract under /bases, /images, /builds and /layers."""
    return [*_base_routes(bases), *_store_routes(store), *_build_routes(builds)]


def _base_routes(bases: BaseBuilder) -> list[Route]:
    async def list_bases(_: Request) -> Response:
        return JSONResponse({"bases": [asdict(status) for status in await bases.catalogue()]})

    async def ensure_base(request: Request) -> Response:
        name = str(request.path_params["name"])
        if ALIASES.get(name, name) not in BASES:
            raise ImageNotFound(
                f"There is no built-in base {name!r}. There are: {', '.join(BASES)}."
            )
        return StreamingResponse(_progress(bases, name), media_type=_NDJSON)

    return [
        Route("/bases", list_bases, methods=["GET"]),
        Route("/bases/{name}", ensure_base, methods=["POST"]),
    ]


def _store_routes(store: ImageStore) -> list[Route]:
    measuring: dict[str, asyncio.Task[dict[str, int]]] = {}

    async def list_images(_: Request) -> Response:
        images = await in_thread(store.list)
        return JSONResponse({"images": [_image(image) for image in images]})

    async def get_image(request: Request) -> Response:
        return JSONResponse(_image(await in_thread(store.get, request.path_params["id"])))

    async def usage(request: Request) -> Response:
        image_id = str(request.path_params["id"])
        task = measuring.get(image_id)
        if task is None:
            # Every inode is read: whoever asks meanwhile gets the same answer.
            task = asyncio.create_task(in_thread(_usage, store, image_id))
            measuring[image_id] = task
            task.add_done_callback(lambda _: measuring.pop(image_id))
        return JSONResponse(await asyncio.shield(task))

    async def delete_image(request: Request) -> Response:
        gone = await in_thread(store.delete, request.path_params["id"])
        return Response(status_code=204) if gone else JSONResponse({"state": "in_use"}, 202)

    return [
        Route("/images", list_images, methods=["GET"]),
        Route("/images/{id}", get_image, methods=["GET"]),
        Route("/images/{id}/usage", usage, methods=["GET"]),
        Route("/images/{id}", delete_image, methods=["DELETE"]),
    ]


def _build_routes(builds: BuildManager) -> list[Route]:
    async def start(request: Request) -> Response:
        status, new = await builds.start(_build_request(await _read(request, _BuildBody)))
        return JSONResponse(asdict(status), 202 if new else 200)

    async def get(request: Request) -> Response:
        return JSONResponse(asdict(await builds.status(request.path_params["id"])))

    async def cancel(request: Request) -> Response:
        build_id = str(request.path_params["id"])
        keep = request.query_params.get("keep_published", "false") == "true"
        await builds.cancel(build_id, keep_published=keep)
        return JSONResponse(asdict(await builds.status(build_id)))

    async def events(request: Request) -> Response:
        after = _number(request, "after")
        follow = request.query_params.get("follow", "false") == "true"
        lines = await builds.events(request.path_params["id"], after, follow=follow)
        return StreamingResponse(lines, media_type=_NDJSON)

    async def drop_layers(request: Request) -> Response:
        await builds.drop_layers(request.path_params["scope"])
        return Response(status_code=204)

    return [
        Route("/layers/{scope}", drop_layers, methods=["DELETE"]),
        Route("/builds", start, methods=["POST"]),
        Route("/builds/{id}", get, methods=["GET"]),
        Route("/builds/{id}", cancel, methods=["DELETE"]),
        Route("/builds/{id}/events", events, methods=["GET"]),
    ]


async def _progress(bases: BaseBuilder, name: str) -> AsyncIterator[bytes]:
    said: asyncio.Queue[str | None] = asyncio.Queue()
    work = asyncio.create_task(bases.ensure(name, said.put_nowait))
    work.add_done_callback(lambda _: said.put_nowait(None))
    try:
        while True:
            try:
                message = await asyncio.wait_for(said.get(), KEEP_ALIVE_SECONDS)
            except TimeoutError:
                yield b"\n"
                continue
            if message is None:
                break
            yield _line({"kind": "progress", "message": message})
        yield _line(_outcome(work))
    finally:
        # Only this listener goes: the base is made on.
        work.cancel()
        with contextlib.suppress(asyncio.CancelledError, HostError, OSError):
            await work


def _outcome(work: asyncio.Task[Image]) -> dict[str, Any]:
    if work.cancelled():
        return {"kind": "error", **HostFault("The host agent is stopping.").to_wire()}
    error = work.exception()
    if error is None:
        return {"kind": "done", "image": _image(work.result())}
    if not isinstance(error, HostError):
        error = HostFault(f"The base could not be made: {error}.")
    return {"kind": "error", **error.to_wire()}


def _usage(store: ImageStore, image_id: str) -> dict[str, int]:
    measured = store.usage(image_id)
    return {
        "size_bytes": measured.size_bytes,
        "shared_bytes": measured.shared_bytes,
        "reclaimable_bytes": measured.size_bytes - measured.shared_bytes,
        "users": len(store.users(image_id)),
    }


def _image(image: Image) -> dict[str, Any]:
    return image.manifest.to_json()


def _build_request(body: _BuildBody) -> BuildRequest:
    for number, step in enumerate(body.recipe, 1):
        if not step.strip() or "\0" in step or len(step.encode()) > _MAX_STEP_BYTES:
            raise InvalidRequest(
                f"recipe: step {number} must be a command of 1 to {_MAX_STEP_BYTES} bytes "
                "without NUL."
            )
    check_environment(body.env)
    return BuildRequest(
        id=body.id,
        base_image=body.base_image,
        recipe=body.recipe,
        network=body.network,
        allow_domains=body.allow_domains,
        cpu=body.limits.cpu,
        memory_mb=body.limits.memory_mb,
        disk_mb=body.limits.disk_mb,
        step_timeout_seconds=body.step_timeout_seconds,
        build_timeout_seconds=body.build_timeout_seconds,
        cache=None if body.cache is None else Cache(body.cache.scope, body.cache.reuse),
        env=body.env,
    )


async def _read[M: _Body](request: Request, model: type[M]) -> M:
    try:
        return model.model_validate_json(await request.body())
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InvalidRequest(f"{where or 'The body'}: {first['msg']}.") from error


def _number(request: Request, name: str) -> int:
    value = request.query_params.get(name, "0")
    if not value.isascii() or not value.isdigit():
        raise InvalidRequest(f"{name} must be a number, 0 or more.")
    return int(value)


def _line(record: dict[str, Any]) -> bytes:
    return json.dumps(record).encode() + b"\n"

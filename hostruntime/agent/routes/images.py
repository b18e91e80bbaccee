"""Built-in bases, and the images of the store."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from hostruntime.agent.requests import path_parameter
from hostruntime.agent.responses import NDJSON, ndjson_line, no_content, respond
from hostruntime.build.bases import BASES, BaseBuilder
from hostruntime.build.log import KEEP_ALIVE_SECONDS
from hostruntime.errors import HostError, HostFault, ImageNotFound
from hostruntime.host.tasks import in_thread
from hostruntime.image.store import ALIASES, Image, ImageStore
from hostruntime.wire.images import Bases, Images, ImageUsage, Progress


def routes(store: ImageStore, bases: BaseBuilder) -> list[Route]:
    """The routes, over a host's images."""
    return [*_base_routes(bases), *_store_routes(store)]


def _base_routes(bases: BaseBuilder) -> list[Route]:
    async def list_bases(_: Request) -> Response:
        return respond(Bases(tuple(await bases.catalogue())))

    async def ensure_base(request: Request) -> Response:
        name = path_parameter(request, "name")
        if ALIASES.get(name, name) not in BASES:
            raise ImageNotFound(
                f"There is no built-in base {name!r}. There are: {', '.join(BASES)}."
            )
        return StreamingResponse(_progress(bases, name), media_type=NDJSON)

    async def request_base(request: Request) -> Response:
        return respond(await bases.request(path_parameter(request, "name")))

    return [
        Route("/bases", list_bases, methods=["GET"]),
        Route("/bases/{name}", ensure_base, methods=["POST"]),
        Route("/bases/{name}", request_base, methods=["PUT"]),
    ]


def _store_routes(store: ImageStore) -> list[Route]:
    measuring: dict[str, asyncio.Task[ImageUsage]] = {}

    async def list_images(_: Request) -> Response:
        images = await in_thread(store.list)
        return respond(Images(tuple(image.manifest.info() for image in images)))

    async def get_image(request: Request) -> Response:
        return respond((await in_thread(store.get, path_parameter(request))).manifest.info())

    async def usage(request: Request) -> Response:
        image_id = path_parameter(request)
        task = measuring.get(image_id)
        if task is None:
            # Every inode is read, so concurrent requests share one measurement.
            task = asyncio.create_task(in_thread(_usage, store, image_id))
            measuring[image_id] = task
            task.add_done_callback(lambda _: measuring.pop(image_id))
        return respond(await asyncio.shield(task))

    async def delete_image(request: Request) -> Response:
        deleted = await in_thread(store.delete, path_parameter(request))
        return no_content() if deleted else JSONResponse({"state": "in_use"}, 202)

    return [
        Route("/images", list_images, methods=["GET"]),
        Route("/images/{id}", get_image, methods=["GET"]),
        Route("/images/{id}/usage", usage, methods=["GET"]),
        Route("/images/{id}", delete_image, methods=["DELETE"]),
    ]


async def _progress(bases: BaseBuilder, name: str) -> AsyncIterator[bytes]:
    messages: asyncio.Queue[str | None] = asyncio.Queue()
    work = asyncio.create_task(bases.ensure(name, messages.put_nowait))
    work.add_done_callback(lambda _: messages.put_nowait(None))
    try:
        while True:
            try:
                message = await asyncio.wait_for(messages.get(), KEEP_ALIVE_SECONDS)
            except TimeoutError:
                yield b"\n"
                continue
            if message is None:
                break
            yield ndjson_line(Progress("progress", message))
        yield ndjson_line(_outcome(work))
    finally:
        # Only this listener stops: the base's build continues.
        work.cancel()
        with contextlib.suppress(asyncio.CancelledError, HostError, OSError):
            await work


def _outcome(work: asyncio.Task[Image]) -> Progress:
    if work.cancelled():
        return Progress("error", error=HostFault("The host agent is stopping.").to_wire())
    error = work.exception()
    if error is None:
        return Progress("done", image=work.result().manifest.info())
    if not isinstance(error, HostError):
        error = HostFault(f"The base could not be created: {error}.")
    return Progress("error", error=error.to_wire())


def _usage(store: ImageStore, image_id: str) -> ImageUsage:
    measured = store.usage(image_id)
    return ImageUsage(
        size_bytes=measured.size_bytes,
        shared_bytes=measured.shared_bytes,
        reclaimable_bytes=measured.size_bytes - measured.shared_bytes,
        users=len(store.users(image_id)),
    )

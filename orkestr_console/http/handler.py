"""The ASGI application of views: what runs on the event loop, and what in which thread.

A call of REST is answered on the event loop, which has its plain parts done in threads
(:mod:`orkestr_console.http.rest`). A page is synchronous throughout, middleware and view, and all
of it runs in one thread of a pool; Django's own handler would change threads six times. What either
awaits on the event loop is cancelled when the client disconnects; a thread runs to its end.
"""

from __future__ import annotations

import asyncio
import io
import threading
from typing import Any, Self, cast

from asgiref.sync import sync_to_async
from django.core import signals
from django.core.exceptions import RequestAborted
from django.core.handlers.asgi import ASGIHandler, get_script_prefix
from django.http import HttpResponseBase
from django.urls import set_script_prefix

from orkestr_console.core.hosts import client_gone
from orkestr_console.http.rest import answer_call, serves
from orkestr_console.http.streams import OwningStream
from orkestr_console.http.threads import ServerThreads, server_threads


class Handler(ASGIHandler):
    """An ASGI application of Django's views and middleware."""

    # A piece of a streamed response is not cut into smaller ones than it was read in.
    chunk_size = 256 * 1024

    def __init__(self) -> None:
        # Not super().__init__(), which would adapt the middleware for an event loop.
        self.load_middleware(is_async=False)
        self._threads = ServerThreads()
        # asgiref asks for a ThreadPoolExecutor by name, and uses what any executor has.
        executor: Any = self._threads.views
        self._answered = sync_to_async(self._answer, thread_sensitive=False, executor=executor)
        self._closed = sync_to_async(_close, thread_sensitive=False, executor=executor)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Serve a request."""
        server_threads.set(self._threads)
        if serves(scope["path"]):
            await self._handle(self._serve_call, scope, receive, send)
        else:
            await super().__call__(scope, receive, send)

    async def handle(self, scope: Any, receive: Any, send: Any) -> None:
        """Serve a page."""
        await self._handle(self._serve_page, scope, receive, send)

    async def _handle(self, serve: Any, scope: Any, receive: Any, send: Any) -> None:
        """Serve a request unless the client disconnects first."""
        try:
            body = await self.read_body(receive)
        except RequestAborted:
            return
        async with Listening(receive):
            await serve(scope, body, send)

    async def read_body(self, receive: Any) -> Any:
        """The body as a file; a short one, as almost all are, needs no file that could grow."""
        message = await receive()
        if message["type"] == "http.request" and not message.get("more_body", False):
            return io.BytesIO(message.get("body", b""))
        messages = iter([message])

        async def from_the_first() -> Any:
            return next(messages, None) or await receive()

        return await super().read_body(from_the_first)

    async def _serve_call(self, scope: Any, body: Any, send: Any) -> None:
        request, refusal = self.create_request(scope, body)
        response: Any = refusal if request is None else await answer_call(request)
        await self._deliver(response, send)
        # Not if the client has left: a thread may still be reading it.
        body.close()

    async def _serve_page(self, scope: Any, body: Any, send: Any) -> None:
        response = await self._answered(scope, body)
        try:
            await self._deliver(response, send)
        finally:
            if response.streaming:
                await self._closed(response)

    async def _deliver(self, response: HttpResponseBase, send: Any) -> None:
        """Send a response; a stream's source ends with it."""
        try:
            await self.send_response(response, send)
        finally:
            if isinstance(response, OwningStream):
                await response.aclose()

    def _answer(self, scope: Any, body: Any) -> HttpResponseBase:
        """A page, in a thread; only a stream is not closed yet, as its content is to come.

        The thread closes ``body``, with the response: it may read it after the client has gone.
        """
        set_script_prefix(get_script_prefix(scope))
        signals.request_started.send(sender=type(self), scope=scope)
        try:
            request, refusal = self.create_request(scope, body)
            # Exactly one of the two is there.
            response: Any = refusal if request is None else self.get_response(request)
            if request is None:
                body.close()
        except BaseException:
            # The client disconnected while a view was waiting.
            body.close()
            signals.request_finished.send(sender=type(self))
            raise
        response._handler_class = type(self)
        if not response.streaming:
            # Returns the connections to the pool; the content stays.
            response.close()
        return cast("HttpResponseBase", response)


class Listening:
    """Cancels the request that runs inside of it when its client disconnects."""

    def __init__(self, receive: Any) -> None:
        self._receive = receive
        self._gone = threading.Event()

    async def __aenter__(self) -> Self:
        client_gone.set(self._gone)
        request = asyncio.current_task()
        assert request is not None
        self._request = request
        # What comes after a request's body is that its client has disconnected.
        self._heard = asyncio.ensure_future(self._receive())
        self._heard.add_done_callback(self._leave)
        return self

    def _leave(self, heard: asyncio.Future[Any]) -> None:
        if heard.cancelled() or heard.exception() is not None:
            return
        # Before the cancellation, which reaches only what a view awaits already.
        self._gone.set()
        self._request.cancel()

    async def __aexit__(self, kind: Any, error: Any, traceback: Any) -> bool:
        self._heard.remove_done_callback(self._leave)
        self._heard.cancel()
        # Whoever else cancelled it has a right to see it cancelled.
        left = self._gone.is_set() and not self._request.uncancel()
        return left and kind is not None and issubclass(kind, asyncio.CancelledError)


def _close(response: HttpResponseBase) -> None:
    response.close()

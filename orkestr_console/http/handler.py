"""Django's ASGI handler, with one change of threads per request instead of six.

Middleware, views and models are synchronous.  Django's own handler runs each part of a request in a
thread by itself, which it starts for this request, and joins in one more.  Here all of a request
runs in one thread of a pool, except the sending.  What a view awaits on the event loop
(:func:`orkestr_console.core.hosts.run_async`) is still cancelled when the client disconnects; the
thread itself runs to its end.
"""

from __future__ import annotations

import asyncio
import threading
from typing import Any, cast

from asgiref.sync import sync_to_async
from django.core import signals
from django.core.exceptions import RequestAborted
from django.core.handlers.asgi import ASGIHandler, get_script_prefix
from django.http import HttpResponseBase
from django.urls import set_script_prefix

from orkestr_console.core.hosts import client_gone
from orkestr_console.http.streams import OwningStream
from orkestr_console.http.threads import RequestThreads

# A buffered command keeps one while it runs; plans limit how many of those run concurrently.
MAX_THREADS = 4096


class Handler(ASGIHandler):
    """An ASGI application of Django's views and middleware."""

    def __init__(self) -> None:
        # Not super().__init__(), which would adapt the middleware for an event loop.
        self.load_middleware(is_async=False)
        # asgiref asks for a ThreadPoolExecutor by name, and uses what any executor has.
        threads: Any = RequestThreads(MAX_THREADS)
        self._answered = sync_to_async(self._answer, thread_sensitive=False, executor=threads)
        self._closed = sync_to_async(_close, thread_sensitive=False, executor=threads)

    async def handle(self, scope: Any, receive: Any, send: Any) -> None:
        """Serve a request unless the client disconnects first."""
        try:
            body = await self.read_body(receive)
        except RequestAborted:
            return
        gone = threading.Event()
        client_gone.set(gone)
        try:
            async with asyncio.TaskGroup() as group:
                listening = group.create_task(self._listen(receive, gone))
                await self._serve(scope, body, send)
                listening.cancel()
        except BaseExceptionGroup as failed:
            _, failure = failed.split(RequestAborted)
            if failure is not None:
                raise failure.exceptions[0] from None

    async def _listen(self, receive: Any, gone: threading.Event) -> None:
        try:
            await self.listen_for_disconnect(receive)
        except RequestAborted:
            # Before the cancellation, which reaches only what a view awaits already.
            gone.set()
            raise

    async def _serve(self, scope: Any, body: Any, send: Any) -> None:
        response = await self._answered(scope, body)
        try:
            await self.send_response(response, send)
        finally:
            if isinstance(response, OwningStream):
                await response.aclose()
            if response.streaming:
                await self._closed(response)

    def _answer(self, scope: Any, body: Any) -> HttpResponseBase:
        """The response, in a thread; only a stream is not closed yet, as its content is to come.

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


def _close(response: HttpResponseBase) -> None:
    response.close()

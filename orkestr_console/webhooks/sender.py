"""The sender: claims deliveries, posts many at once, and records the results.

Each worker process has at most one, which ends when nothing is left to send. The task that starts
it is over at once, so deliveries never take a worker from builds. One thread uses the database. The
requests run on an event loop in a second one, and host names are resolved in a pool of threads that
is as large as the number of requests, so a slow name server holds up nobody else.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from queue import Empty, SimpleQueue

from django.db import connection

from orkestr_console.core.postgres import persistently
from orkestr_console.queue import driving as drivers
from orkestr_console.webhooks import claims
from orkestr_console.webhooks.addresses import UnreachableTarget, parse_target, resolve
from orkestr_console.webhooks.claims import Claimed
from orkestr_console.webhooks.posting import Answer, post
from orkestr_console.webhooks.signing import secret_of, signature

logger = logging.getLogger(__name__)

# How many deliveries one process sends at once.
AT_ONCE = 64
# How often it looks for what has become due, and for senders that are gone.
LOOK_SECONDS = 1.0
RESOLVERS = ThreadPoolExecutor(AT_ONCE, "webhook-resolver")

# Results, or None to look again.
type Inbox = SimpleQueue[tuple[Claimed, Answer] | None]


class Sender:
    """The sender of this process: one run at a time, each in a thread of its own."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._run: Run | None = None

    def wake(self) -> None:
        """Send what is due. Returns at once."""
        with self._guard:
            if self._run is not None:
                self._run.wake()
                return
            run = self._run = Run(self)
        try:
            run_in_background(run)
        except RuntimeError:
            self.end(run)
            raise

    def end(self, run: Run, *, unless_woken: bool = False) -> bool:
        """Note that a run ends, unless it was woken meanwhile; whether it ends."""
        with self._guard:
            if unless_woken and run.is_woken:
                return False
            if self._run is run:
                self._run = None
            return True


class Run:
    """From the first delivery until nothing is left to send."""

    def __init__(self, sender: Sender) -> None:
        self._sender = sender
        self._inbox: Inbox = SimpleQueue()
        self._in_flight = 0
        self._orphaned_since: dict[str, float] = {}
        self.is_woken = False

    def wake(self) -> None:
        """Look again, now."""
        self.is_woken = True
        self._inbox.put(None)

    def __call__(self) -> None:
        """Send. What a failure leaves unsent is another sender's, or the next run's."""
        try:
            with drivers.driving() as driver, event_loop() as loop:
                while self._round(driver, loop):
                    pass
        except Exception:
            logger.exception("the webhooks' sender failed; another will take over")
        finally:
            self._sender.end(self)

    def _round(self, driver: str, loop: asyncio.AbstractEventLoop) -> bool:
        """Begin what there is room for, and record what has ended; False if nothing is left."""
        self.is_woken = False
        self._release_orphans()
        for claimed in claims.claim(driver, AT_ONCE - self._in_flight):
            self._in_flight += 1
            sending = asyncio.run_coroutine_threadsafe(send(claimed), loop)
            sending.add_done_callback(partial(report, self._inbox, claimed))
        if self._in_flight or self._orphaned_since or claims.are_left():
            self._wait(LOOK_SECONDS)
            return True
        return not self._sender.end(self, unless_woken=True)

    def _wait(self, seconds: float) -> None:
        """Wait for a result or a call, and record all results that there are."""
        timeout: float | None = seconds
        while True:
            try:
                result = self._inbox.get(timeout=timeout) if timeout else self._inbox.get_nowait()
            except Empty:
                return
            timeout = None
            if result is not None:
                self._in_flight -= 1
                persistently(partial(claims.conclude, *result))

    def _release_orphans(self) -> None:
        """Take what was being sent by senders that have been gone for a while."""
        now = time.monotonic()
        gone = claims.orphaned_drivers()
        self._orphaned_since = {name: self._orphaned_since.get(name, now) for name in gone}
        sure = {
            name
            for name, since in self._orphaned_since.items()
            if now - since >= drivers.ORPHAN_GRACE_SECONDS
        }
        if sure:
            claims.release(sure)


def report(inbox: Inbox, claimed: Claimed, sending: Future[Answer]) -> None:
    """Pass on a result, unless the sender has ended before it."""
    if not sending.cancelled():
        inbox.put((claimed, sending.result()))


async def send(claimed: Claimed) -> Answer:
    """Post one delivery. Never raises."""
    began = time.monotonic()
    target = parse_target(claimed.url)
    body = claimed.body.encode()
    headers = {
        "X-Orkestr-Event": claimed.event_type,
        "X-Orkestr-Delivery": claimed.delivery_id,
        "X-Orkestr-Signature": signature(secret_of(claimed.webhook_id), body),
    }
    try:
        loop = asyncio.get_running_loop()
        # Waited for to its end, so that nobody has more threads of the pool than deliveries.
        addresses = await loop.run_in_executor(RESOLVERS, resolve, target)
        answer = await post(target, addresses, headers, body)
    except UnreachableTarget as error:
        answer = Answer(error=f"{sentence(str(error))}.")
    except Exception:
        logger.exception("could not send a webhook's delivery: a bug")
        answer = Answer(error="The console could not send it.")
    duration_ms = round((time.monotonic() - began) * 1000)
    return Answer(answer.status, answer.error, duration_ms)


def sentence(text: str) -> str:
    """With a capital."""
    return f"{text[:1].upper()}{text[1:]}"


@contextmanager
def event_loop() -> Iterator[asyncio.AbstractEventLoop]:
    """An event loop that runs in a thread of its own."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="webhook-requests", daemon=True)
    thread.start()
    try:
        yield loop
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()


def run_in_background(work: Callable[[], None]) -> None:
    """Do something in a daemon thread."""

    def run_and_disconnect() -> None:
        try:
            work()
        finally:
            connection.close()

    threading.Thread(target=run_and_disconnect, name="webhooks", daemon=True).start()


sender = Sender()

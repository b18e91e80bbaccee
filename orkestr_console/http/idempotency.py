"""``Idempotency-Key`` on calls that create something: made once, however often they are sent.

A client that got no answer sends the same call with the same key again, and gets the answer to the
first, for a day. A key belongs to a token. The first call is made to its end even if its client
leaves, because that client will come back for the answer. Only success is kept: after an error,
nothing was created, and the same key may be used again.

What names the call's driver is settled as everywhere (:mod:`orkestr_console.queue.driving`): if the
process was killed before there was an answer, the call is made again.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re
import threading
import time
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any, cast

from cryptography.fernet import Fernet
from django.conf import settings
from django.db import transaction
from django.db.models.functions import Now
from django.http import HttpRequest, HttpResponse, HttpResponseBase

from orkestr_console.accounts.models import KeyedCall
from orkestr_console.core.errors import Conflict, InvalidInput, Unauthenticated
from orkestr_console.core.hosts import client_gone
from orkestr_console.core.postgres import persistently, release_before_waiting
from orkestr_console.http.decorators import authenticate_ahead
from orkestr_console.http.threads import in_thread
from orkestr_console.queue.driving import ORPHAN_GRACE_SECONDS, IsDriven, driving

HEADER, IN_META = "Idempotency-Key", "HTTP_IDEMPOTENCY_KEY"
REPLAYED = "Idempotent-Replayed"
KEPT = timedelta(days=1)
CREATES = re.compile(
    r"/v1/(?:templates|sandboxes|sandboxes/(?:webhooks|volumes)"
    r"|sandboxes/[^/]+/(?:snapshots|commands))"
)
KEY = re.compile(r"[!-~]{1,255}")
FIRST_ERROR = 300
PURPOSE = b"answers to calls with a key"

# Calls that are made to their end without their clients; the event loop has only weak references.
_running: set[asyncio.Task[HttpResponseBase]] = set()


@dataclass(frozen=True)
class Call:
    """A call that is made now, and what releases its driver's lock."""

    row: int
    driver: str
    lock: ExitStack


def is_keyed(request: HttpRequest) -> bool:
    """Whether the call creates something under a key of its client's."""
    return (
        # Not request.headers, which is made of all of them.
        IN_META in request.META
        and request.method == "POST"
        and CREATES.fullmatch(request.path_info) is not None
    )


async def answer_once(
    request: HttpRequest, answer: Callable[[], Awaitable[HttpResponseBase]]
) -> HttpResponseBase:
    """The answer to a keyed call: that of its first time, or what ``answer`` gives now.

    Raises ``InvalidInput`` for a key that another call had, ``Conflict`` while the first is made.
    """
    # From its beginning: once the key is claimed, nobody else could conclude the call.
    task = asyncio.ensure_future(make(request, answer))
    _running.add(task)
    task.add_done_callback(_running.discard)
    return await asyncio.shield(task)


async def make(
    request: HttpRequest, answer: Callable[[], Awaitable[HttpResponseBase]]
) -> HttpResponseBase:
    """Make the call, unless there is an answer, and keep its answer if it succeeded."""
    # Nobody tells it that its client has gone.
    client_gone.set(threading.Event())
    call = await in_thread(begin, request)
    if isinstance(call, HttpResponse):
        return call
    response: Any = None
    try:
        response = await answer()
    finally:
        await in_thread(conclude, call, response)
    return cast("HttpResponseBase", response)


def begin(request: HttpRequest) -> Call | HttpResponse:
    """Claim the key, or the answer that it stands for."""
    key = request.META[IN_META]
    if not KEY.fullmatch(key):
        raise InvalidInput(f"{HEADER}: must be 1 to 255 printable ASCII characters.")
    token = authenticate_ahead(request).token
    if token is None:
        raise Unauthenticated
    with ExitStack() as stack:
        driver = stack.enter_context(driving())
        row = claim_once_sure(token.pk, key, fingerprint(request), driver)
        if row.status is not None:
            return replay(row)
        return Call(row.pk, driver, stack.pop_all())


class Orphaned(Exception):  # noqa: N818 - not an error
    """The call's driver seems to be gone."""

    def __init__(self, driver: str) -> None:
        super().__init__(driver)
        self.driver = driver


def claim_once_sure(token_id: str, key: str, fingerprint: str, driver: str) -> KeyedCall:
    """:func:`claim`; of a driver that is gone, once that has been so for a while."""
    try:
        return claim(token_id, key, fingerprint, driver)
    except Orphaned as orphaned:
        release_before_waiting()
        # PostgreSQL may have just restarted, and live drivers take their locks again.
        time.sleep(ORPHAN_GRACE_SECONDS)
        try:
            return claim(token_id, key, fingerprint, driver, gone=orphaned.driver)
        except Orphaned:
            raise in_use() from None


def claim(
    token_id: str, key: str, fingerprint: str, driver: str, gone: str | None = None
) -> KeyedCall:
    """The row of this call, which this driver now makes unless the row has its answer.

    Raises ``Orphaned`` if its driver seems to be gone, and is not the one that is known to be.
    """
    KeyedCall.objects.filter(created_at__lt=Now() - KEPT).delete()
    with transaction.atomic():
        fields = {"fingerprint": fingerprint, "driver": driver}
        # A row that is there already is locked at once: whoever made it may be about to forget it.
        KeyedCall.objects.bulk_create(
            [KeyedCall(token_id=token_id, key=key, **fields)],
            update_conflicts=True,
            unique_fields=["token", "key"],
            update_fields=["key"],
        )
        rows = KeyedCall.objects.select_for_update().annotate(is_driven=IsDriven("driver"))
        row: Any = rows.get(token_id=token_id, key=key)
        if row.fingerprint != fingerprint:
            raise InvalidInput(
                f"{HEADER}: another call had this key; use a new one for each thing to create.",
                code="idempotency_key_reused",
            )
        if row.status is None and row.driver != driver:
            if not row.is_driven and row.driver != gone:
                raise Orphaned(row.driver)
            if row.is_driven:
                raise in_use()
            KeyedCall.objects.filter(pk=row.pk).update(driver=driver)
    claimed: KeyedCall = row
    return claimed


def in_use() -> Conflict:
    """The error while another makes the call."""
    return Conflict(
        "The call with this Idempotency-Key is still being made; ask again in a moment.",
        code="idempotency_key_in_use",
        retry_after=1,
    )


def fingerprint(request: HttpRequest) -> str:
    """What tells one call from another: where it goes, and what it says."""
    return hashlib.sha256(request.get_full_path().encode() + b"\0" + request.body).hexdigest()


def replay(row: KeyedCall) -> HttpResponse:
    """The answer of the first time."""
    answer = cipher().decrypt(bytes(row.answer))
    headers = {REPLAYED: "true"}
    return HttpResponse(answer, status=row.status, content_type="application/json", headers=headers)


def conclude(call: Call, response: HttpResponseBase | None) -> None:
    """Keep a success, forget everything else, and release the driver's lock."""
    rows = KeyedCall.objects.filter(pk=call.row)
    with call.lock:
        if isinstance(response, HttpResponse) and response.status_code < FIRST_ERROR:
            kept = {
                "status": response.status_code,
                "answer": cipher().encrypt(response.content),
                "driver": "",
            }
            persistently(lambda: rows.update(**kept))
        else:
            # Unless another has taken it over.
            persistently(rows.filter(driver=call.driver).delete)


@cache
def cipher() -> Fernet:
    """With a key that is derived from the pepper: a stolen database alone reveals no answer."""
    key = hashlib.sha256(PURPOSE + settings.TOKEN_PEPPER.encode()).digest()
    return Fernet(base64.urlsafe_b64encode(key))

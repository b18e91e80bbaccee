"""Addresses that files are sent to and fetched from without a token, and those transfers.

An address says which file of which sandbox, for what method, until when, and which API token asked
for it, and is signed with the installation's key (HMAC-SHA256, :mod:`django.core.signing`). It can
do no more than that token can when it is used: a revoked token takes its addresses with it. An
upload's is good for one whole upload, a download's until it expires.

A transfer has three parts: one in a thread that reads rows, one on the event loop, for as long as
bytes pass, that holds neither a thread nor a database connection, and one that records the outcome.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AsyncExitStack, aclosing, suppress
from dataclasses import astuple, dataclass
from datetime import UTC, datetime
from time import monotonic

from django.core.signing import BadSignature, Signer
from django.utils import timezone

from hostruntime import errors as host_errors
from hostruntime.wire.files import FilePart, WantedPart
from orkestr_console.accounts import audit
from orkestr_console.accounts.actor import READ, WRITE, Actor
from orkestr_console.accounts.audit import audited
from orkestr_console.accounts.services import require_live, signer_actor
from orkestr_console.core.errors import DomainError, Forbidden, MethodNotAllowed
from orkestr_console.core.hosts import Steps, async_host, in_steps
from orkestr_console.core.postgres import persistently, unavailable
from orkestr_console.http.closing import cut_off_reason
from orkestr_console.http.steps import to_its_end
from orkestr_console.http.threads import in_thread
from sandboxes_app.models import Sandbox, UsedUpload
from sandboxes_app.services.files import file_error, on_volume, required_path, writable_path
from sandboxes_app.services.waking import find_awake, translate_paused
from sandboxes_app.specs import PresignSpec

UPLOAD, DOWNLOAD = "PUT", "GET"
SALT = "orkestr.transfers"
# How often a transfer in progress checks that its token is still valid.
RECHECK_SECONDS = 10.0
ASK_AGAIN = "Ask for a new one, with files/presign-upload or files/presign-download."


@dataclass(frozen=True)
class Address:
    """What an address says; ``expires`` is in Unix seconds, and ``nonce`` makes each one of a kind.

    The order of the fields is that of what is signed.
    """

    sandbox: str
    method: str
    path: str
    expires: int
    token: str
    nonce: str

    def signed(self) -> str:
        """The address as one segment of a URL."""
        return signer().sign_object(list(astuple(self)))

    @classmethod
    def read(cls, text: str) -> Address:
        """What a signed address says. Raises ``Forbidden`` unless we signed it."""
        try:
            return cls(*signer().unsign_object(text))
        except (BadSignature, ValueError, TypeError):
            raise Forbidden(
                f"This address was not made here, or is not complete. {ASK_AGAIN}",
                code="address_invalid",
            ) from None

    @property
    def expires_at(self) -> datetime:
        """The end of its use."""
        return datetime.fromtimestamp(self.expires, UTC)


def signer() -> Signer:
    """What signs addresses, and nothing else."""
    return Signer(salt=SALT)


@dataclass(frozen=True)
class Transfer:
    """A transfer that may begin."""

    actor: Actor
    sandbox: Sandbox
    address: Address


# Asking for an address ---------------------------------------------------------------------------


@in_steps
@audited("file.presign", "sandbox", note=lambda made, _: {"method": UPLOAD, "path": made.path})
def presign_upload(actor: Actor, sandbox_id: str, spec: PresignSpec) -> Steps[Address]:
    """An address that a file can be sent to.

    Raises ``NotFound``, ``Conflict`` (not running), ``InvalidInput`` (outside the writable roots).
    """
    actor.require(WRITE)
    path = writable_path(spec.path)
    return (yield from make_address(actor, sandbox_id, UPLOAD, path, spec.expires_in))


@in_steps
@audited("file.presign", "sandbox", note=lambda made, _: {"method": DOWNLOAD, "path": made.path})
def presign_download(actor: Actor, sandbox_id: str, spec: PresignSpec) -> Steps[Address]:
    """An address that a file can be fetched from. Raises ``NotFound``, ``Conflict``."""
    actor.require(READ)
    path = required_path(spec.path)
    return (yield from make_address(actor, sandbox_id, DOWNLOAD, path, spec.expires_in))


def make_address(
    actor: Actor, sandbox_id: str, method: str, path: str, seconds: int
) -> Steps[Address]:
    """An address for ``seconds`` from now. Raises ``Forbidden`` to whoever has no token."""
    sandbox = yield from find_awake.steps(actor, sandbox_id)
    if method == UPLOAD:
        on_volume(sandbox, path)
    if actor.token is None:
        raise Forbidden("Only an API token can make such an address; use one.")
    expires, nonce = int(time.time()) + seconds, secrets.token_urlsafe(16)
    return Address(sandbox.pk, method, path, expires, actor.token.pk, nonce)


# Using one: what comes first, in a thread --------------------------------------------------------


def begin_download(text: str, client: str | None) -> Transfer:
    """The download that an address allows to a ``client`` at this network address.

    Raises ``Forbidden`` (not ours, expired, the token no longer valid), ``MethodNotAllowed``,
    ``RateLimited``, ``Conflict`` (not running).
    """
    return admit(text, DOWNLOAD, READ, client)


async def begin_upload(text: str, client: str | None) -> Transfer:
    """Like :func:`begin_download`, for an upload; also ``Forbidden`` if there was one already.

    On the event loop: if it is cancelled, the thread still uses the address, which is undone.
    """
    admitted = asyncio.ensure_future(in_thread(admit_upload, text, client))
    try:
        return await asyncio.shield(admitted)
    except asyncio.CancelledError:
        with suppress(Exception):
            transfer = await asyncio.shield(admitted)
            await asyncio.shield(in_thread(abandon_upload, transfer, cut_off_reason()))
        raise


def admit_upload(text: str, client: str | None) -> Transfer:
    """The part of :func:`begin_upload` that runs in a thread."""
    transfer = admit(text, UPLOAD, WRITE, client)
    with audit.denials(transfer.actor, "file.write", "sandbox", transfer.sandbox.pk):
        claim(transfer.address)
    return transfer


def admit(text: str, method: str, scope: str, client: str | None) -> Transfer:
    """What an address allows now. Raises like :func:`begin_download`."""
    address = Address.read(text)
    if address.method != method:
        raise MethodNotAllowed(method, (address.method,))
    if address.expires <= time.time():
        raise Forbidden(f"This address has expired. {ASK_AGAIN}", code="address_expired")
    actor = signer_actor(address.token, "rest", client)
    actor.require(scope)
    return Transfer(actor, find_awake(actor, address.sandbox), address)


def claim(address: Address) -> None:
    """Use an upload's address. Raises ``Forbidden`` if it is used already."""
    defaults = {"expires_at": address.expires_at}
    _, unused = UsedUpload.objects.get_or_create(pk=address.nonce, defaults=defaults)
    if not unused:
        raise Forbidden(
            f"This address has been used, or is just being used. {ASK_AGAIN}", code="address_used"
        )


def forget_expired() -> None:
    """Forget used addresses that have expired, and are refused for that."""
    UsedUpload.objects.filter(expires_at__lte=timezone.now()).delete()


# While bytes pass, on the event loop -------------------------------------------------------------


type UploadOutcome = int | host_errors.HostError | DomainError


async def run_upload(
    transfer: Transfer, length: int, body: AsyncGenerator[bytes | memoryview]
) -> UploadOutcome:
    """Send the ``length`` bytes of a body into the sandbox as they come; the bytes written.

    Returns the host's errors. If it is cancelled before the last byte has come, the file stays as
    it was, and the address can be used again; afterwards, the file is written and recorded.
    """
    whole = asyncio.Event()
    writing = asyncio.ensure_future(write(transfer, length, body, whole))
    try:
        return await asyncio.shield(writing)
    except asyncio.CancelledError:
        if not whole.is_set():
            writing.cancel()
        await to_its_end(record_end(transfer, writing, cut_off_reason()))
        raise


async def write(
    transfer: Transfer,
    length: int,
    body: AsyncGenerator[bytes | memoryview],
    whole: asyncio.Event,
) -> UploadOutcome:
    """Send a body into the sandbox; sets ``whole`` once nothing of it is missing."""
    address = transfer.address

    async def content() -> AsyncGenerator[bytes | memoryview]:
        async with aclosing(while_allowed(transfer, body)) as pieces:
            async for piece in pieces:
                yield piece
        whole.set()

    try:
        async with aclosing(body), aclosing(content()) as pieces:
            return await async_host().write_stream(address.sandbox, address.path, length, pieces)
    except (host_errors.HostError, DomainError) as error:
        return error


async def record_end(
    transfer: Transfer, writing: asyncio.Future[UploadOutcome], reason: str
) -> None:
    """Record an upload whose client has left: what came of it, or that it broke off."""
    try:
        outcome = await writing
    except asyncio.CancelledError:
        await in_thread(abandon_upload, transfer, reason)
        return
    with suppress(DomainError):
        await in_thread(conclude_upload, transfer, outcome)


class Download:
    """A part of a file on its way out of a sandbox; close it."""

    def __init__(self, transfer: Transfer) -> None:
        self._transfer = transfer
        self._stack = AsyncExitStack()
        self._pieces: AsyncIterator[memoryview] | None = None

    @property
    def path(self) -> str:
        """The file's path in the sandbox."""
        return self._transfer.address.path

    async def open(self, wanted: WantedPart) -> FilePart:
        """Begin; what part of the file it is. Raises the domain errors of files, and ``Asleep``."""
        address, sandbox = self._transfer.address, self._transfer.sandbox
        opening = async_host().read_part(address.sandbox, address.path, wanted)
        try:
            part, self._pieces = await self._stack.enter_async_context(opening)
        except host_errors.HostError as error:
            if (paused := translate_paused(self._transfer.actor, sandbox, error)) is not None:
                raise paused from error
            raise await in_thread(file_error, sandbox, error) from error
        return part

    async def pieces(self) -> AsyncGenerator[memoryview]:
        """The bytes as they come; fewer if the file was cut, or the token revoked, meanwhile.

        Each piece is valid until the next is asked for.
        """
        assert self._pieces is not None
        try:
            async for piece in while_allowed(self._transfer, self._pieces):
                yield piece
        except (host_errors.HostError, DomainError, TimeoutError):
            # Part of the response has been sent, so only its end can say that something is wrong.
            return

    async def aclose(self) -> None:
        """End it."""
        await self._stack.aclose()


async def while_allowed[Piece](
    transfer: Transfer, pieces: AsyncIterator[Piece]
) -> AsyncGenerator[Piece]:
    """The pieces, as long as the transfer's token is valid. Raises ``Forbidden`` once it isn't."""
    trusted_until = monotonic() + RECHECK_SECONDS
    async for piece in pieces:
        if monotonic() >= trusted_until:
            await in_thread(require_still_allowed, transfer)
            trusted_until = monotonic() + RECHECK_SECONDS
        yield piece


def require_still_allowed(transfer: Transfer) -> None:
    """Raise ``Forbidden`` if the token is no longer valid.

    While the database is away it is: nobody can have revoked it.
    """
    try:
        require_live(transfer.address.token)
    except DomainError:
        raise
    except Exception as error:
        if unavailable(error) is None:
            raise


# What comes last, in a thread --------------------------------------------------------------------


def conclude_upload(transfer: Transfer, outcome: UploadOutcome) -> int:
    """Record an upload; the bytes written. Raises the domain errors of files."""
    return _conclude(transfer.actor, transfer.sandbox.pk, transfer, outcome)


@audited("file.write", "sandbox")
def _conclude(actor: Actor, sandbox_id: str, transfer: Transfer, outcome: UploadOutcome) -> int:
    if isinstance(outcome, int):
        record_upload(transfer, {"bytes": outcome})
        return outcome
    release(transfer.address)
    if isinstance(outcome, DomainError):
        raise outcome
    raise file_error(transfer.sandbox, outcome) from outcome


def abandon_upload(transfer: Transfer, reason: str) -> None:
    """Record that an upload broke off, and let its address be used again."""
    persistently(lambda: release(transfer.address))
    record_upload(transfer, {"ended": reason})


def release(address: Address) -> None:
    """Let an upload's address be used again: nothing was written."""
    UsedUpload.objects.filter(pk=address.nonce).delete()


def record_upload(transfer: Transfer, data: dict[str, object]) -> None:
    """Add an upload to the audit log."""
    sandbox = transfer.sandbox
    persistently(
        lambda: audit.record(
            transfer.actor,
            "file.write",
            kind="sandbox",
            object_id=sandbox.pk,
            name=sandbox.template_name,
            data={"path": transfer.address.path, **data},
        )
    )

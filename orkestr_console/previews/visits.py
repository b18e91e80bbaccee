"""One visitor's connection: its requests, one after the other, and what becomes of each.

The front says who shares what with whom (:class:`Surroundings`); everything else is here.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from http import HTTPStatus
from typing import Protocol

import h11

from hostruntime.host.patience import scaled
from orkestr_console.core.errors import DomainError, HostUnavailable
from orkestr_console.core.postgres import unavailable
from orkestr_console.core.preview_base import PreviewBase, PreviewTarget
from orkestr_console.previews import answers
from orkestr_console.previews.answers import SHELL, Answer
from orkestr_console.previews.entry import Secrets, Visit, admit
from orkestr_console.previews.exchange import (
    Exchange,
    NothingPasses,
    ProgramFailed,
    Switched,
    Tunnel,
    VisitorLeft,
)
from orkestr_console.previews.headers import (
    CODE_HEADER,
    Origin,
    cookie_name,
    first,
    inwards,
    wants_websocket,
)
from orkestr_console.previews.wire import Headers, HeadTooLarge, Wire
from sandboxes_app import services
from sandboxes_app.models import Sandbox, SandboxStatus
from sandboxes_app.services import ASLEEP, Unreached

logger = logging.getLogger(__name__)

# How long a request's head may take, from the connection on, and between two requests.
HEAD_SECONDS, KEEP_ALIVE_SECONDS = 15.0, 75.0
# How long an answer of the front's own may take to be sent.
ANSWER_SECONDS = 15.0
# How often a sandbox is woken for a request that may be paused again as soon as it is awake.
MAX_ATTEMPTS = 3
# How long the row of a sandbox may be behind that has just been paused.
AHEAD_SECONDS = 0.3
HEALTH = b"/healthz"


class TooMany(Exception):  # noqa: N818 - what it is
    """There is no place left for one more request."""


class Surroundings(Protocol):
    """What a visit shares with the others."""

    base: PreviewBase

    def place(self, sandbox: Sandbox) -> AbstractContextManager[None]:
        """A place among a sandbox's and its team's requests. Raises ``TooMany``."""

    def waits(self, visit: Visitor, *, for_request: bool) -> None:
        """A visitor waits for its next request, and may have to make room; or does no more."""

    def client(self, peer: str, headers: Headers) -> str:
        """The visitor's network address, by what proxies that are trusted say."""


@dataclass(eq=False)
class Visitor:
    """A visitor's connection. ``peer`` is the address that it comes from."""

    wire: Wire
    peer: str
    around: Surroundings

    async def serve(self) -> None:
        """Answer its requests until it has no more."""
        seconds = HEAD_SECONDS
        try:
            while await self._serve_one(seconds):
                self.wire.http.start_next_cycle()
                seconds = KEEP_ALIVE_SECONDS
        except (VisitorLeft, OSError, TimeoutError):
            self.wire.abort()
        except asyncio.CancelledError:
            self.wire.abort()
            raise
        except Exception:
            logger.exception("a visit failed")
            self.wire.abort()
        else:
            await self.wire.close_gently()

    async def _serve_one(self, seconds: float) -> bool:
        """Serve one request; whether there may be another. Raises ``VisitorLeft``, ``OSError``."""
        self.around.waits(self, for_request=True)
        try:
            async with asyncio.timeout(seconds):
                request = await self.wire.receive()
        except h11.RemoteProtocolError as error:
            hint = HTTPStatus(error.error_status_hint)
            too_large = hint == HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
            await self._refuse(answers.HEAD_TOO_LARGE if too_large else answers.MALFORMED)
            return False
        except HeadTooLarge:
            await self._refuse(answers.HEAD_TOO_LARGE)
            return False
        finally:
            self.around.waits(self, for_request=False)
        if not isinstance(request, h11.Request):
            return False
        await self._answer(request)
        http = self.wire.http
        return http.our_state is h11.DONE and http.their_state is h11.DONE

    async def _refuse(self, answer: Answer) -> None:
        """Answer what could not be read as a request."""
        if self.wire.http.our_state in {h11.IDLE, h11.SEND_RESPONSE}:
            await self._say(answer, [])

    async def _answer(self, request: h11.Request) -> None:
        # By their names in lower case.
        headers = list(request.headers)
        answer = await self._carry(request, headers)
        if answer is not None:
            await self._say(answer, headers, without_body=request.method == b"HEAD")

    async def _carry(self, request: h11.Request, headers: Headers) -> Answer | None:
        """Carry a request to where it belongs; what is to be said if that is nowhere."""
        host = (first(headers, b"host") or b"").decode("latin-1")
        target = self.around.base.read(host)
        if target is None:
            is_probe = request.target == HEALTH and request.method in {b"GET", b"HEAD"}
            return answers.HEALTHY if is_probe else answers.UNKNOWN
        if is_ambiguous(request, headers):
            return answers.MALFORMED
        visit = Visit(
            request.method,
            request.target,
            headers,
            target.host,
            wants_websocket(request.method, headers),
        )
        try:
            return await self._visit(visit, target)
        except TooMany:
            return answers.TOO_MANY
        except HostUnavailable:
            return answers.AWAY
        except DomainError as error:
            return replace(answers.AWAY, detail=error.detail)
        except (OSError, VisitorLeft, TimeoutError):
            raise
        except Exception as error:
            if unavailable(error) is not None:
                return answers.AWAY
            # Not the request itself, which has tokens in it.
            logger.exception("a request for a preview failed")
            if self.wire.http.our_state is not h11.SEND_RESPONSE:
                raise
            return answers.BROKEN

    async def _visit(self, visit: Visit, target: PreviewTarget) -> Answer | None:
        """Raises ``TooMany``, ``DomainError``, ``VisitorLeft``, and what the database raises."""
        sandbox = await services.find_previewed(target.sandbox_id)
        if sandbox is None:
            return answers.UNKNOWN
        entry = admit(visit, secrets_of(sandbox, target.port), self.around.base)
        if entry is None:
            return answers.TOKEN_NEEDED
        if entry.redirect:
            return self._sign_in(sandbox, target, entry.target)
        with self.around.place(sandbox):
            for _ in range(MAX_ATTEMPTS):
                if (answer := await self._await_running(sandbox)) is not None:
                    return answer
                program = await services.connect_to_port(sandbox, target.port)
                match program:
                    case Unreached.CLOSED:
                        return answers.nothing_listens(target.port)
                    case Unreached.GONE:
                        return answers.UNKNOWN
                    case Unreached.PAUSED:
                        sandbox = await self._read_again(sandbox)
                        if sandbox is None:
                            return answers.UNKNOWN
                    case _:
                        return await self._exchange(visit, target, entry.target, program)
            return answers.PAUSED

    def _sign_in(self, sandbox: Sandbox, target: PreviewTarget, clean: bytes) -> Answer:
        """Absolute, as an address that begins with two slashes would lead elsewhere."""
        base = self.around.base
        address = f"{base.scheme}://{target.host}".encode() + clean
        secret = services.preview_cookie(sandbox, target.port)
        attributes = "Path=/; HttpOnly; SameSite=Lax" + ("; Secure" if base.is_secure else "")
        return answers.redirect(address, f"{cookie_name(base)}={secret}; {attributes}".encode())

    async def _read_again(self, sandbox: Sandbox) -> Sandbox | None:
        """The row of a sandbox that the host says is paused; None if it has ended."""
        found = await services.find_previewed(sandbox.pk)
        if found is not None and found.status == SandboxStatus.RUNNING:
            # The host is ahead of the row, for a moment.
            await asyncio.sleep(AHEAD_SECONDS)
            found.status = SandboxStatus.PAUSING
        return found

    async def _await_running(self, sandbox: Sandbox) -> Answer | None:
        """Wake a sandbox that wakes by itself; what to say if it does not run."""
        if sandbox.status == SandboxStatus.STARTING:
            return answers.STARTING
        if sandbox.status not in ASLEEP:
            return None
        if not sandbox.auto_resume:
            return answers.PAUSED
        try:
            await services.wake_for_visitor(sandbox)
        except DomainError as error:
            return answers.cannot_wake(error.detail)
        sandbox.status = SandboxStatus.RUNNING
        return None

    async def _exchange(
        self, visit: Visit, target: PreviewTarget, path: bytes, sock: socket.socket
    ) -> Answer | None:
        """Carry a request over a connection, and close that. Raises ``VisitorLeft``."""
        program = Wire(sock, h11.CLIENT)
        request = self._inward_request(visit, target, path)
        exchange = Exchange(self.wire, program, request, self.around.base)
        try:
            await exchange.run()
        except Switched:
            with contextlib.suppress(NothingPasses):
                await Tunnel(self.wire, program).run()
        except (ProgramFailed, NothingPasses) as error:
            if exchange.answered:
                # Only the end of the connection can say that the response is not whole.
                raise VisitorLeft from error
            return answers.SILENT if isinstance(error, NothingPasses) else answers.UNINTELLIGIBLE
        finally:
            program.close()
        return None

    def _inward_request(self, visit: Visit, target: PreviewTarget, path: bytes) -> h11.Request:
        base = self.around.base
        client = self.around.client(self.peer, visit.headers)
        origin = Origin(client, base.scheme, target.host)
        headers = inwards(visit.headers, origin, base, websocket=visit.websocket)
        return h11.Request(method=visit.method, target=path, headers=headers)

    async def _say(self, answer: Answer, headers: Headers, *, without_body: bool = False) -> None:
        """Send an answer of the front's own. Raises ``OSError``, ``TimeoutError``."""
        kind, body = answer.body(headers)
        sent: Headers = [
            (b"content-type", kind),
            (b"content-length", str(len(body)).encode()),
            (CODE_HEADER, answer.code.encode()),
            *SHELL,
            *answer.headers,
        ]
        if self.wire.http.their_state is not h11.DONE:
            sent.append((b"connection", b"close"))
        async with asyncio.timeout(scaled(ANSWER_SECONDS)):
            await self.wire.send(
                h11.Response(
                    status_code=answer.status,
                    headers=sent,
                    reason=answer.status.phrase.encode(),
                )
            )
            if not without_body:
                await self.wire.send(h11.Data(data=body))
            await self.wire.send(h11.EndOfMessage())


def secrets_of(sandbox: Sandbox, port: int) -> Secrets | None:
    """What opens a sandbox's port; None if it is public."""
    if not sandbox.preview_auth:
        return None
    return Secrets(services.preview_token(sandbox), services.preview_cookie(sandbox, port))


def is_ambiguous(request: h11.Request, headers: Headers) -> bool:
    """Whether two programs could read a request's head differently (RFC 9112, 6.1 and 3.2)."""
    names = [name for name, _ in headers]
    two_lengths = b"content-length" in names and b"transfer-encoding" in names
    # In HTTP/1.0 there are no chunks, and another form of target could name another host.
    chunked_early = request.http_version < b"1.1" and b"transfer-encoding" in names
    whole = request.method == b"OPTIONS" and request.target == b"*"
    # Whatever follows it is no HTTP (RFC 9110, 9.3.6).
    tunnel = request.method == b"CONNECT"
    named = request.target.startswith(b"/") or whole
    return two_lengths or chunked_early or tunnel or not named

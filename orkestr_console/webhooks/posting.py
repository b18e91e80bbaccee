"""Posting to a stranger's server: a bounded time and memory, whatever it answers.

The request goes to an address that was checked (:mod:`orkestr_console.webhooks.addresses`), under
the host's own name for TLS. Of the response, the status is read and nothing else. Redirects are not
followed, so no other address is ever reached.
"""

from __future__ import annotations

import asyncio
import re
import ssl
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from hostruntime.network.policy import Address
from orkestr_console.webhooks.addresses import Target

# For connecting, TLS, sending, and the status of the response together.
TOTAL_SECONDS = 10.0
# What is buffered of a response, and the most lines that are read of it.
LINE_BYTES = 8 * 1024
MAX_LINES = 200
USER_AGENT = "Orkestr-Webhooks/1"
# RFC 9112, section 4.
STATUS_LINE = re.compile(rb"HTTP/1\.[01] ([1-5][0-9]{2})(?: .*)?\r?\n?", re.DOTALL)
FINAL = 200
REDIRECTS = range(300, 400)
SUCCESS = range(200, 300)


@dataclass(frozen=True)
class Answer:
    """The result of one attempt: ``error`` is blank if the server accepted it."""

    status: int | None = None
    error: str = ""
    duration_ms: int = 0

    @property
    def accepted(self) -> bool:
        """Whether the server accepted the delivery."""
        return not self.error


async def post(
    target: Target, addresses: Sequence[Address], headers: Mapping[str, str], body: bytes
) -> Answer:
    """Post to the first of the addresses that accepts a connection. Never raises."""
    try:
        async with asyncio.timeout(TOTAL_SECONDS):
            status = await exchange(target, addresses, encode_request(target, headers, body))
    except TimeoutError:
        return Answer(error=f"It did not answer within {TOTAL_SECONDS:.0f} seconds.")
    except ssl.SSLCertVerificationError as error:
        return Answer(error=f"Its TLS certificate is not valid: {error.verify_message}.")
    except ssl.SSLError as error:
        return Answer(error=f"TLS failed: {error.reason or error}.")
    except (EOFError, asyncio.LimitOverrunError, ValueError):
        return Answer(error="It did not answer in HTTP/1.1.")
    except OSError as error:
        return Answer(error=f"It cannot be reached: {error.strerror or error}.")
    if status in SUCCESS:
        return Answer(status)
    followed = "; redirects are not followed" if status in REDIRECTS else ""
    return Answer(status, f"It answered {status}{followed}.")


def encode_request(target: Target, headers: Mapping[str, str], body: bytes) -> bytes:
    """The whole request (RFC 9112)."""
    fields = {
        "Host": target.authority,
        "User-Agent": USER_AGENT,
        "Content-Type": "application/json",
        "Content-Length": str(len(body)),
        "Connection": "close",
        **headers,
    }
    lines = [f"POST {target.path} HTTP/1.1", *(f"{name}: {text}" for name, text in fields.items())]
    return "\r\n".join([*lines, "", ""]).encode("ascii") + body


async def exchange(target: Target, addresses: Sequence[Address], request: bytes) -> int:
    """Send the request; the response's status. Raises ``OSError``, ``EOFError``, ``ValueError``."""
    reader, writer = await connect(target, addresses)
    try:
        writer.write(request)
        await writer.drain()
        return await read_status(reader)
    finally:
        # Not closed politely: it would wait for a peer that goes on sending.
        writer.transport.abort()


async def connect(
    target: Target, addresses: Sequence[Address]
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection to the first address that accepts one. Raises the last one's ``OSError``."""
    secure = {"ssl": tls_context(), "server_hostname": target.host} if target.is_https else {}
    refused: OSError = OSError("it has no address")
    for address in addresses:
        try:
            return await asyncio.open_connection(
                str(address),
                target.port,
                limit=LINE_BYTES,
                **secure,  # type: ignore[arg-type]
            )
        except ssl.SSLError:
            raise
        except OSError as error:
            refused = error
    raise refused


@cache
def tls_context() -> ssl.SSLContext:
    """The context of all connections: reading the system's certificates takes a while."""
    return ssl.create_default_context()


async def read_status(reader: asyncio.StreamReader) -> int:
    """The status of the final response, after any interim ones (RFC 9110, section 15.2)."""
    status = 0
    for _ in range(MAX_LINES):
        line = await reader.readuntil(b"\n")
        if not status:
            found = STATUS_LINE.fullmatch(line)
            if found is None:
                raise ValueError("no status line")
            status = int(found[1])
            if status >= FINAL:
                return status
        elif not line.strip():
            status = 0
    raise ValueError("too many lines before the response")

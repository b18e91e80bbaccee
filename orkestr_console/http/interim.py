"""Interim answers: what keeps a client waiting for an answer that takes long.

The official SDK gives up on a connection that says nothing for 30 s, whatever it asked for. An
answer of class 1xx before the real one starts its clock anew (RFC 9110, section 15.2), and any
client must be able to read one. Not all are: Python's ``http.client`` takes 102 for the answer
itself and skips 100 (RFC 9110, 15.2.1), Node does it the other way round, and Go before 1.23 gives
up after five. So only clients that are known get any, by the name they go by.
"""

from __future__ import annotations

import re

# Well under 30 s, should one be late.
INTERIM_SECONDS = 9.0
PROCESSING = b"HTTP/1.1 102 Processing\r\n\r\n"  # RFC 2518, section 10.1
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
_ACCEPTS_102 = re.compile(rb"(?:orkestr-|python-httpx/|curl/|node|undici|mozilla/|.*\baiohttp/)")
_ACCEPTS_100 = re.compile(rb"(?:python-requests/|python-urllib)")


def interim_answer(
    *, protocol: bytes, path: bytes, agent: bytes, connection: bytes
) -> bytes | None:
    """What to send such a request while its answer is not there; None for nothing.

    A proxy that closes its connection to us after each answer is most likely nginx, which takes
    the first 1xx for the answer (nginx issue 1427). What speaks HTTP/1.0 knows none of them.
    """
    if protocol != b"HTTP/1.1" or not path.startswith(b"/v1/") or b"close" in connection.lower():
        return None
    if _ACCEPTS_102.match(agent.lower()):
        return PROCESSING
    return CONTINUE if _ACCEPTS_100.match(agent.lower()) else None

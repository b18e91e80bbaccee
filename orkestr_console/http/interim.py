"""Interim responses, which keep a client waiting for a slow call.

The official SDK gives up on a connection that is silent for 30 s, whatever the call. A 1xx response
before the final one restarts its timeout (RFC 9110, section 15.2), and every client must be able to
read one. Not all can: Python's ``http.client`` takes 102 for the final response and skips 100 (RFC
9110, 15.2.1), Node does the opposite, and Go before 1.23 gives up after five. So only known clients
get any, by their user agent.
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
    """The interim response for a request; None for none.

    A proxy that closes its connection to us after each response is most likely nginx, which takes
    the first 1xx for the final response (nginx issue 1427). HTTP/1.0 has no interim responses.
    """
    if protocol != b"HTTP/1.1" or not path.startswith(b"/v1/") or b"close" in connection.lower():
        return None
    if _ACCEPTS_102.match(agent.lower()):
        return PROCESSING
    return CONTINUE if _ACCEPTS_100.match(agent.lower()) else None

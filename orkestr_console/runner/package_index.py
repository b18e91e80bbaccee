"""Whether the index that pip is configured with answers; for bootstrap.sh, which comes first.

Run with the Python that pip belongs to: ``python package_index.py``.  Prints nothing when the index
answers, and otherwise what is wrong with it, as the end of a sentence.  The standard library alone,
as nothing else may be installed yet; a proxy of the environment is used as urllib(3) and pip do.
"""

from __future__ import annotations

import http.client
import socket
import ssl
import subprocess
import sys
import urllib.error
import urllib.request
from urllib.parse import urlsplit

SECONDS = 10.0
# An index that has no such page answers all the same.
_ANSWERS = 500


def configured_index() -> str:
    """The address that pip would ask, from its files and environment, or its own."""
    asked = [sys.executable, "-m", "pip", "config", "get"]
    for name in (":env:.index-url", "install.index-url", "global.index-url"):
        found = subprocess.run([*asked, name], capture_output=True, text=True, check=False)
        if found.returncode == 0 and found.stdout.strip():
            return found.stdout.strip()
    from pip._internal.models.index import PyPI

    return str(PyPI.simple_url)


def trouble(index: str, seconds: float = SECONDS) -> str | None:
    """What keeps an index from answering; None when it does, or is a directory."""
    if urlsplit(index).scheme == "file":
        return None
    try:
        # Any package's page: the page of all is large. One that asks for a login has answered.
        with urllib.request.urlopen(f"{shown(index).rstrip('/')}/pip/", timeout=seconds) as answer:  # noqa: S310
            answer.read(1)
    except urllib.error.HTTPError as error:
        return f"answers {error.code} {error.reason}" if error.code >= _ANSWERS else None
    except urllib.error.URLError as error:
        return _words(error.reason, index, seconds)
    except (OSError, http.client.HTTPException) as error:
        return _words(error, index, seconds)
    return None


def _words(reason: object, index: str, seconds: float) -> str:
    name = urlsplit(index).hostname
    if isinstance(reason, socket.gaierror):
        return f"cannot be found: the name {name} cannot be resolved (DNS)"
    if isinstance(reason, TimeoutError):
        return f"does not answer within {seconds:.0f} s"
    if isinstance(reason, ssl.SSLCertVerificationError):
        return f"shows a certificate that is not trusted here ({reason.verify_message})"
    if isinstance(reason, ConnectionRefusedError):
        return "refuses connections"
    return f"cannot be reached ({reason})"


def shown(index: str) -> str:
    """The address without a login."""
    parts = urlsplit(index)
    host = parts.hostname or ""
    return parts._replace(netloc=f"{host}:{parts.port}" if parts.port else host).geturl()


if __name__ == "__main__":
    where = configured_index()
    if wrong := trouble(where):
        sys.stdout.write(f"the package index {shown(where)} {wrong}\n")

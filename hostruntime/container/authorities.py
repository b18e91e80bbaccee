"""Certificate authorities in the two forms that programs want: PEM, and a Java key store."""

from __future__ import annotations

import binascii
import hashlib
import re
import struct
from base64 import b64decode
from collections.abc import Iterable

_CERTIFICATE = re.compile(
    rb"-----BEGIN CERTIFICATE-----([A-Za-z0-9+/=\s]+)-----END CERTIFICATE-----"
)
# sun.security.provider.JavaKeyStore, which every JVM reads: magic, version, and what its digest
# begins with beside the password.
_MAGIC, _VERSION, _TRUSTED = 0xFEEDFEED, 2, 2
# Everybody's: it guards against damage alone.
_KEY_OF_ALL = "changeit"
_WHITENER = b"Mighty Aphrodite"


def certificates(pem: bytes) -> dict[bytes, bytes]:
    """The certificates in a PEM file (RFC 7468), each once, in order: base64 body to its text."""
    return {b"".join(found[1].split()): found[0] for found in _CERTIFICATE.finditer(pem)}


def without_certificates(pem: bytes, unwanted: Iterable[bytes]) -> bytes:
    """The PEM file without certificates of those base64 bodies; all other text stays."""
    gone = frozenset(unwanted)
    pattern = re.compile(_CERTIFICATE.pattern + rb"\n?")
    return pattern.sub(lambda found: b"" if b"".join(found[1].split()) in gone else found[0], pem)


def java_key_store(pem: bytes) -> bytes:
    """The certificates of a PEM file as a Java key store (JKS, password "changeit").

    What is no base64 is left out: an image may hold anything.
    """
    bodies = [der for body in certificates(pem) if (der := _der(body)) is not None]
    entries = b"".join(
        struct.pack(">I", _TRUSTED)
        + _utf(f"orkestr-{number}")
        + struct.pack(">Q", 0)
        + _utf("X.509")
        + struct.pack(">I", len(der))
        + der
        for number, der in enumerate(bodies, 1)
    )
    store = struct.pack(">III", _MAGIC, _VERSION, len(bodies)) + entries
    secret = _KEY_OF_ALL.encode("utf-16-be") + _WHITENER
    return store + hashlib.sha1(secret + store, usedforsecurity=False).digest()


def _der(body: bytes) -> bytes | None:
    try:
        return b64decode(body, validate=True)
    except binascii.Error:
        return None


def _utf(text: str) -> bytes:
    data = text.encode()
    return struct.pack(">H", len(data)) + data

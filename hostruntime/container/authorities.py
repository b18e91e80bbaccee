"""Certificate authorities in the two formats that programs need: PEM, and a Java key store."""

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
# The format of sun.security.provider.JavaKeyStore, which every JVM reads: magic, version, type.
_MAGIC, _VERSION, _TRUSTED_ENTRY = 0xFEEDFEED, 2, 2
# The well-known password, which only detects corruption, and the fixed salt of the digest.
_INTEGRITY_KEY = "changeit"
_DIGEST_SALT = b"Mighty Aphrodite"


def certificates(pem: bytes) -> dict[bytes, bytes]:
    """The certificates in a PEM file (RFC 7468), each once, in order: base64 body to its text."""
    return {b"".join(match[1].split()): match[0] for match in _CERTIFICATE.finditer(pem)}


def without_certificates(pem: bytes, unwanted: Iterable[bytes]) -> bytes:
    """The PEM file without the certificates with those base64 bodies; other text is retained."""
    removed = frozenset(unwanted)
    pattern = re.compile(_CERTIFICATE.pattern + rb"\n?")
    return pattern.sub(
        lambda match: b"" if b"".join(match[1].split()) in removed else match[0], pem
    )


def java_key_store(pem: bytes) -> bytes:
    """The certificates of a PEM file as a Java key store (JKS, password "changeit").

    Invalid base64 is skipped: an image may contain anything.
    """
    bodies = [der for body in certificates(pem) if (der := _der(body)) is not None]
    entries = b"".join(
        struct.pack(">I", _TRUSTED_ENTRY)
        + _utf(f"orkestr-{number}")
        + struct.pack(">Q", 0)
        + _utf("X.509")
        + struct.pack(">I", len(der))
        + der
        for number, der in enumerate(bodies, 1)
    )
    store = struct.pack(">III", _MAGIC, _VERSION, len(bodies)) + entries
    secret = _INTEGRITY_KEY.encode("utf-16-be") + _DIGEST_SALT
    return store + hashlib.sha1(secret + store, usedforsecurity=False).digest()


def _der(body: bytes) -> bytes | None:
    try:
        return b64decode(body, validate=True)
    except binascii.Error:
        return None


def _utf(text: str) -> bytes:
    data = text.encode()
    return struct.pack(">H", len(data)) + data

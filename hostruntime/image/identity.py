"""The identity each machine needs and no image may contain: a machine id and SSH host keys.

The scrub removes both from every image, and a container has no init that would generate new ones,
so they are written to the empty writable layer before it starts. Host keys are for images with an
SSH server: `sshd` and `service ssh start` then work as usual, and no two sandboxes have the same
key.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from hostruntime.image.trees import lstat, open_directory, open_if_directory

_SERVER_CONFIGURATION = "sshd_config"
# From sshd_config(5)'s defaults, without RSA: generating that takes a second, and every client
# accepts these.
_KEY_GENERATORS: Mapping[
    str, Callable[[], ed25519.Ed25519PrivateKey | ec.EllipticCurvePrivateKey]
] = {
    "ssh_host_ed25519_key": ed25519.Ed25519PrivateKey.generate,
    "ssh_host_ecdsa_key": lambda: ec.generate_private_key(ec.SECP256R1()),
}
_OVERLAY_NAMESPACES = ("trusted.", "security.")
_COMMENT = b" root@sandbox\n"


def write_identity(image: Path, upper: Path, *, machine_id: bool = True) -> None:
    """Write a new identity into the writable layer ``upper`` over ``image``; blocks.

    Builds get no machine id: a template's content must not depend on it. Directories are created
    with the metadata they have in the image; if the image has something else in their place,
    nothing is written. Raises OSError.
    """
    with (
        open_directory(image) as below,
        open_directory(upper) as above,
        open_if_directory("etc", below) as etc,
    ):
        if etc is None:
            return
        if machine_id and _is_missing_or_empty("machine-id", etc):
            with _layer_directory("etc", below, above) as own:
                _write("machine-id", f"{secrets.token_hex(16)}\n".encode(), 0o444, own)
        with open_if_directory("ssh", etc) as ssh:
            if ssh is None or not _needs_host_keys(ssh):
                return
            with (
                _layer_directory("etc", below, above) as own,
                _layer_directory("ssh", etc, own) as keys,
            ):
                for name, make in _KEY_GENERATORS.items():
                    _write_key(name, make(), keys)


def _is_missing_or_empty(name: str, directory: int) -> bool:
    found = _lstat_or_none(name, directory)
    return found is None or (stat.S_ISREG(found.st_mode) and found.st_size == 0)


def _needs_host_keys(ssh: int) -> bool:
    if _lstat_or_none(_SERVER_CONFIGURATION, ssh) is None:
        return False
    return all(_lstat_or_none(name, ssh) is None for name in _KEY_GENERATORS)


def _lstat_or_none(name: str, directory: int) -> os.stat_result | None:
    with contextlib.suppress(FileNotFoundError):
        return lstat(name, directory)
    return None


@contextmanager
def _layer_directory(name: str, below: int, above: int) -> Iterator[int]:
    """Create a directory of the image in the writable layer, where overlayfs merges the two."""
    with open_directory(name, below) as original:
        found = os.fstat(original)
        with contextlib.suppress(FileExistsError):
            os.mkdir(name, mode=0o700, dir_fd=above)
        with open_directory(name, above) as created:
            os.fchown(created, found.st_uid, found.st_gid)
            os.fchmod(created, stat.S_IMODE(found.st_mode))
            for attribute in os.listxattr(original):
                if not attribute.startswith(_OVERLAY_NAMESPACES):
                    os.setxattr(created, attribute, os.getxattr(original, attribute))
            yield created
            os.utime(created, ns=(found.st_atime_ns, found.st_mtime_ns))


def _write_key(
    name: str, key: ed25519.Ed25519PrivateKey | ec.EllipticCurvePrivateKey, directory: int
) -> None:
    private = key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
    public = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    _write(name, private, 0o600, directory)
    _write(f"{name}.pub", public + _COMMENT, 0o644, directory)


def _write(name: str, data: bytes, mode: int, directory: int) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(name, flags, 0o600, dir_fd=directory)
    with open(descriptor, "wb") as file:  # noqa: PTH123 - a descriptor, not a path
        os.fchmod(descriptor, mode)
        file.write(data)

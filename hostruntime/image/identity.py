"""What a machine must have of its own and no image holds: a machine id, and SSH host keys.

The scrub takes both out of every image; there is no init in a container that would make them
anew, so they are put into the empty writable layer before it starts.  Host keys are for images
with an SSH server; `sshd` and `service ssh start` then work as on any machine, and no two
sandboxes answer with the same key.
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

from hostruntime.image.trees import opened, opened_if_directory, status

_SERVER_CONFIGURATION = "sshd_config"
# Of sshd_config(5)'s defaults; an RSA key takes a second to make, and any client takes these.
_KEYS: Mapping[str, Callable[[], ed25519.Ed25519PrivateKey | ec.EllipticCurvePrivateKey]] = {
    "ssh_host_ed25519_key": ed25519.Ed25519PrivateKey.generate,
    "ssh_host_ecdsa_key": lambda: ec.generate_private_key(ec.SECP256R1()),
}
_OVERLAYS_OWN = ("trusted.", "security.")
_COMMENT = b" root@sandbox\n"


def give_identity(image: Path, upper: Path, *, machine_id: bool = True) -> None:
    """Put into the writable layer ``upper`` over ``image`` what is to be its own; blocks.

    Builds get no machine id: a template's content must not depend on it.  Directories are those
    of the image again, as it shows them; where it has something else in their place nothing is
    written.  Raises OSError.
    """
    with (
        opened(image) as below,
        opened(upper) as above,
        opened_if_directory("etc", below) as etc,
    ):
        if etc is None:
            return
        if machine_id and _has_none("machine-id", etc):
            with _shown("etc", below, above) as own:
                _write("machine-id", f"{secrets.token_hex(16)}\n".encode(), 0o444, own)
        with opened_if_directory("ssh", etc) as ssh:
            if ssh is None or not _wants_keys(ssh):
                return
            with _shown("etc", below, above) as own, _shown("ssh", etc, own) as keys:
                for name, make in _KEYS.items():
                    _write_key(name, make(), keys)


def _has_none(name: str, directory: int) -> bool:
    found = _status(name, directory)
    return found is None or (stat.S_ISREG(found.st_mode) and found.st_size == 0)


def _wants_keys(ssh: int) -> bool:
    if _status(_SERVER_CONFIGURATION, ssh) is None:
        return False
    return all(_status(name, ssh) is None for name in _KEYS)


def _status(name: str, directory: int) -> os.stat_result | None:
    with contextlib.suppress(FileNotFoundError):
        return status(name, directory)
    return None


@contextmanager
def _shown(name: str, below: int, above: int) -> Iterator[int]:
    """A directory of the image's, in the writable layer: what is put there shows in addition."""
    with opened(name, below) as original:
        found = os.fstat(original)
        with contextlib.suppress(FileExistsError):
            os.mkdir(name, mode=0o700, dir_fd=above)
        with opened(name, above) as made:
            os.fchown(made, found.st_uid, found.st_gid)
            os.fchmod(made, stat.S_IMODE(found.st_mode))
            for attribute in os.listxattr(original):
                if not attribute.startswith(_OVERLAYS_OWN):
                    os.setxattr(made, attribute, os.getxattr(original, attribute))
            yield made
            os.utime(made, ns=(found.st_atime_ns, found.st_mtime_ns))


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

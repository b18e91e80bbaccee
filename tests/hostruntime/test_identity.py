"""What each container gets of its own: ids and keys, in the image's own directories."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key

from hostruntime.image.identity import write_identity
from tests.hostruntime.trees_help import grow, shape

KEYS = ("ssh_host_ed25519_key", "ssh_host_ecdsa_key")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return grow(tmp_path / "image", {"etc/machine-id": "", "etc/ssh/sshd_config": "Port 22"})


@pytest.fixture
def upper(tmp_path: Path) -> Path:
    return grow(tmp_path / "upper", {})


def test_a_server_gets_keys_of_its_own(image: Path, upper: Path, tmp_path: Path) -> None:
    write_identity(image, upper)
    other = grow(tmp_path / "other", {})
    write_identity(image, other)
    for name in KEYS:
        key = upper / "etc/ssh" / name
        private = load_ssh_private_key(key.read_bytes(), None)
        public = load_ssh_public_key(key.with_suffix(".pub").read_bytes())
        assert private.public_key() == public
        assert stat.S_IMODE(key.stat().st_mode) == 0o600
        assert (key.stat().st_uid, key.stat().st_gid) == (0, 0)
        assert key.read_bytes() != (other / "etc/ssh" / name).read_bytes()


def test_a_machine_id_is_everybodys_own(image: Path, upper: Path, tmp_path: Path) -> None:
    other = grow(tmp_path / "other", {})
    ids = []
    for layer in (upper, other):
        write_identity(image, layer)
        ids.append((layer / "etc/machine-id").read_text())
    assert all(len(one) == 33 and int(one, 16) for one in ids)
    assert ids[0] != ids[1]


def test_a_build_has_keys_and_no_machine_id(image: Path, upper: Path) -> None:
    write_identity(image, upper, machine_id=False)
    assert not (upper / "etc/machine-id").exists()
    assert (upper / "etc/ssh" / KEYS[0]).exists()


def test_directories_are_the_images_own(image: Path, upper: Path) -> None:
    os.chown(image / "etc/ssh", 33, 4)
    (image / "etc/ssh").chmod(0o2750)
    os.setxattr(image / "etc/ssh", "user.note", b"kept")
    os.utime(image / "etc", (1, 2))
    write_identity(image, upper)
    found = (upper / "etc/ssh").stat()
    assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (33, 4, 0o2750)
    assert os.getxattr(upper / "etc/ssh", "user.note") == b"kept"
    assert (upper / "etc").stat().st_mtime == 2


@pytest.mark.parametrize(
    ("files", "given"),
    [
        ({"bin/sh": "x"}, set()),
        ({"etc/machine-id": "0123"}, set()),
        ({"etc/hostname": "h", "etc/ssh/ssh_config": "client"}, {"etc/machine-id"}),
        (
            {"etc/machine-id": "0", "etc/ssh/sshd_config": "", "etc/ssh/ssh_host_ecdsa_key": "k"},
            set(),
        ),
    ],
)
def test_nothing_is_given_that_is_not_needed(
    tmp_path: Path, upper: Path, files: dict[str, str | None], given: set[str]
) -> None:
    write_identity(grow(tmp_path / "other", files), upper)
    assert {name for name, what in shape(upper).items() if what != "/"} == given


@pytest.mark.parametrize("link", ["etc", "etc/ssh", "etc/machine-id"])
def test_a_link_in_the_image_leads_nowhere(
    image: Path, upper: Path, tmp_path: Path, link: str
) -> None:
    outside = tmp_path / "outside"
    (image / link).rename(outside)
    (image / link).symlink_to(outside)
    before = shape(tmp_path / "outside") if outside.is_dir() else outside.read_text()
    write_identity(image, upper)
    assert not any(name.startswith(link) for name in shape(upper) if shape(upper)[name] != "/")
    after = shape(tmp_path / "outside") if outside.is_dir() else outside.read_text()
    assert after == before

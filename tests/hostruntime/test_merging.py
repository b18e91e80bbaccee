"""Files that an image and the runtime layer both have: joined, and parted again at capture."""

from __future__ import annotations

import hashlib
import os
from base64 import b64encode
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from hostruntime.container import merging
from hostruntime.container.authorities import certificates, java_key_store, without_certificates
from hostruntime.container.merging import (
    BEGIN_MARKER,
    END_MARKER,
    MAX_BYTES,
    PLACEHOLDER,
    LostWrites,
    merge,
    open_image,
    refresh_host_parts,
    strip_host_parts,
)
from hostruntime.image.trees import open_directory
from tests.hostruntime.trees_help import grow, shape, whiteout

BUNDLE = "etc/ssl/certs/ca-certificates.crt"
LOCAL = "usr/local/share/ca-certificates"
OURS = {
    BUNDLE: "{corp}",
    "etc/hosts": "127.0.0.1 localhost\n",
    "etc/environment": "https_proxy=http://192.0.2.1:1\n",
    "etc/npmrc": "proxy=http://192.0.2.1:1\nregistry=https://npm.example/\n",
    "etc/gitconfig": "[include]\n\tpath = /.orkestr/gitconfig\n",
    "etc/wgetrc": "https_proxy = http://192.0.2.1:1\n",
    "etc/apt/sources.list": "deb https://debs.example/debian bookworm main\n",
    ".yarnrc.yml": "httpProxy: http://192.0.2.1:1\n",
    "etc/resolv.conf": "# none\n",
    "etc/profile.d/00-orkestr.sh": "true\n",
}


def pem(name: str) -> str:
    body = b64encode(hashlib.sha256(name.encode()).digest() * 3).decode()
    return f"-----BEGIN CERTIFICATE-----\n{body}\n-----END CERTIFICATE-----\n"


def seen(image: Path, path: str, ours: str | None = None) -> str | None:
    """What a container on the image sees at a path; None where that is the image's alone."""
    with open_image(image) as files:
        found = merge(path, (OURS[path] if ours is None else ours).encode(), files)
    return None if found is None else found.decode()


def marked(ours: str) -> str:
    return f"{BEGIN_MARKER.decode()}\n{ours}{END_MARKER.decode()}\n"


# Joining ----------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["etc/hosts", "etc/environment", "etc/npmrc", "etc/gitconfig"])
def test_the_images_lines_come_after_ours_and_win(tmp_path: Path, path: str) -> None:
    image = grow(tmp_path, {path: "theirs\n"})
    assert seen(image, path) == marked(OURS[path]) + "theirs\n"
    (image / path).unlink()
    assert seen(image, path) == marked(OURS[path])


def test_the_bundle_has_the_images_authorities_and_the_hosts_each_once(tmp_path: Path) -> None:
    image = grow(tmp_path, {BUNDLE: pem("public") + pem("company")})
    found = seen(image, BUNDLE, pem("public") + pem("edge"))
    assert found == pem("public") + pem("company") + marked(pem("edge"))
    assert seen(image, BUNDLE, pem("company")) == pem("public") + pem("company")


def test_a_packages_own_file_is_not_there_before_the_package(tmp_path: Path) -> None:
    assert seen(grow(tmp_path, {"etc/": None}), "etc/wgetrc") is None
    assert seen(grow(tmp_path, {"etc/wgetrc": "tries = 3\n"}), "etc/wgetrc") == (
        marked(OURS["etc/wgetrc"]) + "tries = 3\n"
    )


def test_a_file_that_cannot_be_joined_is_the_images_own(tmp_path: Path) -> None:
    assert seen(grow(tmp_path, {"etc/": None}), ".yarnrc.yml") == OURS[".yarnrc.yml"]
    assert seen(grow(tmp_path, {".yarnrc.yml": "x: 1\n"}), ".yarnrc.yml") is None


@pytest.mark.parametrize(
    ("theirs", "expected"),
    [
        (None, "{ours}"),
        ("{place}\n", "{ours}"),
        ("deb https://corp.example/x bookworm main\n", None),
        ("# moved to sources.list.d\n", None),
        (
            "{place}\ndeb https://corp.example/x stable main\n",
            "{ours}deb https://corp.example/x stable main\n",
        ),
        # As the bootstrap of a base writes them, and images have them that were made of it.
        ("deb http://debs.example/debian/ bookworm main\n", "{ours}"),
        (
            "deb http://debs.example/debian bookworm main\n"
            "deb https://corp.example/x stable main\n",
            "{ours}deb https://corp.example/x stable main\n",
        ),
    ],
)
def test_mirrors_are_the_hosts_unless_the_image_names_its_own(
    tmp_path: Path, theirs: str | None, expected: str | None
) -> None:
    image = grow(tmp_path, {"etc/": None})
    if theirs is not None:
        grow(image, {"etc/apt/sources.list": theirs.format(place=PLACEHOLDER.decode())})
    ours = marked(OURS["etc/apt/sources.list"])
    wanted = None if expected is None else expected.format(ours=ours)
    assert seen(image, "etc/apt/sources.list") == wanted


# Hostile images ---------------------------------------------------------------------------


def test_a_link_leads_nowhere_but_in_the_image(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("of the host\n")
    image = grow(tmp_path / "image", {"etc/": None, "opt/own": "theirs\n"})
    (image / "etc/npmrc").symlink_to("/opt/own")
    assert seen(image, "etc/npmrc") == marked(OURS["etc/npmrc"]) + "theirs\n"
    for target in (str(secret), "../../secret", "/proc/self/environ", "/nowhere", "npmrc"):
        (image / "etc/npmrc").unlink()
        (image / "etc/npmrc").symlink_to(target)
        assert seen(image, "etc/npmrc") is None
    (image / "etc/hosts").symlink_to(str(secret))
    assert seen(image, "etc/hosts") == marked(OURS["etc/hosts"])


def test_only_regular_files_of_a_bounded_size_are_read(tmp_path: Path) -> None:
    image = grow(tmp_path, {"etc/": None})
    os.mkfifo(image / "etc/npmrc")
    os.mknod(image / "etc/gitconfig", 0o20666, os.makedev(1, 5))
    (image / "etc/environment").mkdir()
    with (image / "etc/hosts").open("wb") as huge:
        huge.truncate(MAX_BYTES + 1)
    assert [seen(image, f"etc/{name}") for name in ("npmrc", "gitconfig", "environment")] == (
        [None] * 3
    )
    # A container cannot do without it.
    assert seen(image, "etc/hosts") == marked(OURS["etc/hosts"])


# Taking back ------------------------------------------------------------------------------


class Build:
    """A base, what a container on it was lent, and the tree that was captured."""

    def __init__(self, root: Path, base: dict[str, str | None]) -> None:
        self.base = grow(root / "base", {"etc/ssl/certs/": None, **base})
        self.lent = grow(root / "lent", {f"{LOCAL}/edge.crt": pem("edge")})
        self.tree = root / "tree"
        for path, ours in OURS.items():
            found = seen(self.base, path, pem("edge") if path == BUNDLE else ours)
            if found is not None:
                grow(self.lent, {path: found})
        grow(self.tree, {"etc/ssl/certs/": None})
        for file in self.base.rglob("*"):
            if file.is_file():
                target = self.tree / file.relative_to(self.base)
                target.parent.mkdir(parents=True, exist_ok=True)
                os.link(file, target)

    def writes(self, path: str, change: dict[str, str] | None = None, more: str = "") -> None:
        """A step edits what it sees: the joined file."""
        text = (self.lent / path).read_text()
        for old, new in (change or {}).items():
            text = text.replace(old, new)
        self.sets(path, text + more)

    def sets(self, path: str, text: str) -> None:
        (self.tree / path).unlink(missing_ok=True)
        grow(self.tree, {path: text})

    def captured(self, path: str) -> str | None:
        strip_host_parts(self.tree, self.base, self.lent)
        return (self.tree / path).read_text() if (self.tree / path).exists() else None


@pytest.mark.parametrize("base", [{}, {"etc/hosts": "10.0.0.1 a\n", "etc/npmrc": "fund=false\n"}])
@pytest.mark.parametrize("path", ["etc/hosts", "etc/npmrc"])
def test_what_a_step_appends_is_all_that_is_captured(
    tmp_path: Path, base: dict[str, str | None], path: str
) -> None:
    build = Build(tmp_path, base)
    build.writes(path, more="10.0.0.7 db\n")
    assert build.captured(path) == (base.get(path) or "") + "10.0.0.7 db\n"


def test_a_file_of_the_base_is_never_written_to(tmp_path: Path) -> None:
    build = Build(tmp_path, {"etc/hosts": "10.0.0.1 a\n"})
    before = (build.base / "etc/hosts").stat()
    assert build.captured("etc/hosts") == "10.0.0.1 a\n"
    build.writes("etc/hosts", {BEGIN_MARKER.decode(): BEGIN_MARKER.decode()})
    assert build.captured("etc/hosts") == "10.0.0.1 a\n"
    after = (build.base / "etc/hosts").stat()
    assert (after.st_ino, after.st_mtime_ns, after.st_size, after.st_nlink) == (
        (before.st_ino, before.st_mtime_ns, before.st_size, before.st_nlink)
    )
    assert (build.tree / "etc/hosts").stat().st_ino == before.st_ino


def test_nothing_is_left_of_a_file_that_was_ours_alone(tmp_path: Path) -> None:
    build = Build(tmp_path, {})
    build.writes("etc/environment")
    assert build.captured("etc/environment") is None


def test_a_line_of_ours_that_a_step_changed_is_the_recipes(tmp_path: Path) -> None:
    build = Build(tmp_path, {})
    build.writes("etc/apt/sources.list", {"bookworm main": "bookworm main contrib"})
    changed = "deb https://debs.example/debian bookworm main contrib\n"
    assert build.captured("etc/apt/sources.list") == changed
    build.writes(
        "etc/gitconfig", {END_MARKER.decode(): "\tpath = /opt/own\n" + END_MARKER.decode()}
    )
    assert build.captured("etc/gitconfig") == "[include]\n\tpath = /opt/own\n"


def test_mirrors_keep_their_place_and_are_the_next_hosts(tmp_path: Path) -> None:
    build = Build(tmp_path, {})
    build.writes("etc/apt/sources.list", more="deb https://corp.example/x stable main\n")
    assert build.captured("etc/apt/sources.list") == (
        f"{PLACEHOLDER.decode()}\ndeb https://corp.example/x stable main\n"
    )
    again = seen(build.tree, "etc/apt/sources.list", "deb https://other.example/d bookworm main\n")
    assert again is not None
    assert again.splitlines()[1] == "deb https://other.example/d bookworm main"


def test_a_program_that_drops_comments_does_not_keep_the_proxy(tmp_path: Path) -> None:
    build = Build(tmp_path, {})
    build.sets(
        "etc/npmrc", "proxy = http://192.0.2.1:1\nregistry=https://npm.example/\nfund=false\n"
    )
    assert build.captured("etc/npmrc") == "fund=false\n"


def test_a_company_authority_is_captured_and_the_hosts_own_is_not(tmp_path: Path) -> None:
    build = Build(tmp_path, {BUNDLE: pem("public")})
    # As update-ca-certificates does: the bundle anew of all it finds, and links.
    company = {f"{LOCAL}/company.crt": pem("company")}
    grow(build.tree, {**company})
    build.sets(BUNDLE, pem("public") + pem("edge") + pem("company"))
    for name in ("edge", "company"):
        (build.tree / f"etc/ssl/certs/{name}.pem").symlink_to(f"/{LOCAL}/{name}.crt")
        (build.tree / f"etc/ssl/certs/{name}.0").symlink_to(f"{name}.pem")
    assert build.captured(BUNDLE) == pem("public") + pem("company")
    links = {name for name in shape(build.tree / "etc/ssl/certs") if "crt" not in name}
    assert links == {"company.pem", "company.0"}
    both = seen(build.tree, BUNDLE, pem("public") + pem("edge"))
    assert both == pem("public") + pem("company") + marked(pem("edge"))


def test_what_is_no_small_file_is_not_looked_into(tmp_path: Path) -> None:
    build = Build(tmp_path, {})
    (build.tree / "etc/hosts").symlink_to("/opt/hosts")
    with (build.tree / "etc/npmrc").open("wb") as huge:
        huge.truncate(1 << 30)
    assert strip_host_parts(build.tree, build.base, build.lent) == 0
    assert (build.tree / "etc/hosts").is_symlink()


# Lending again ---------------------------------------------------------------------------


def test_a_saved_disk_has_the_lines_of_the_network_it_is_started_on(tmp_path: Path) -> None:
    build = Build(tmp_path, {"etc/hosts": "10.0.0.1 a\n"})
    upper = grow(tmp_path / "upper", {"etc/npmrc": "fund=false\n"})
    restricted = grow(tmp_path / "restricted", {**OURS})
    for path in ("etc/hosts", "etc/environment", "etc/apt/sources.list"):
        grow(upper, {path: (build.lent / path).read_text() + "# own\n"})
    ours = {
        "etc/hosts": marked("127.0.0.1 localhost\n::1 localhost\n") + "10.0.0.1 a\n",
        "etc/apt/sources.list": marked("deb https://other.example/d bookworm main\n"),
    }
    now = grow(tmp_path / "now", {"etc/environment": marked("LANG=C.UTF-8\n"), **ours})
    assert refresh_host_parts(upper, now, [restricted]) == 3
    assert (upper / "etc/hosts").read_text() == ours["etc/hosts"] + "# own\n"
    assert (upper / "etc/environment").read_text() == marked("LANG=C.UTF-8\n") + "# own\n"
    assert (upper / "etc/apt/sources.list").read_text() == (
        ours["etc/apt/sources.list"] + "# own\n"
    )
    assert (upper / "etc/npmrc").read_text() == "fund=false\n"
    assert refresh_host_parts(upper, now, [now]) == 0


# What stays behind ------------------------------------------------------------------------


def test_what_no_sandbox_will_see_is_told_once_at_the_step_that_wrote_it(tmp_path: Path) -> None:
    build, unkept = Build(tmp_path, {}), LostWrites()
    upper = grow(tmp_path / "upper", {"etc/hosts": "10.0.0.7 db\n", "opt/x": "y"})
    assert unkept.after_step(upper, build.lent) == []
    grow(upper, {"etc/resolv.conf": "nameserver 192.0.2.53\n"})
    assert unkept.after_step(upper, build.lent) == ["/etc/resolv.conf"]
    whiteout(upper / "etc/apt/sources.list")
    assert unkept.after_step(upper, build.lent) == ["/etc/apt/sources.list"]
    assert unkept.after_step(upper, build.lent) == []
    # Copied up by a chown, and not changed.
    grow(upper, {"etc/profile.d/00-orkestr.sh": OURS["etc/profile.d/00-orkestr.sh"]})
    assert unkept.after_step(upper, build.lent) == []


def swapped(monkeypatch: pytest.MonkeyPatch, name: str, swap: Callable[[int], None]) -> None:
    """Have a step that still runs put something else there once the file has been looked at."""

    def status(looked_at: str, directory: int) -> os.stat_result:
        found = os.stat(looked_at, dir_fd=directory, follow_symlinks=False)
        if looked_at == name:
            swap(directory)
        return found

    monkeypatch.setattr(merging, "lstat", status)


def test_a_file_that_becomes_a_pipe_as_it_is_read_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = Build(tmp_path, {})
    upper = grow(tmp_path / "upper", {"etc/resolv.conf": "nameserver 192.0.2.53\n"})

    def pipe(directory: int) -> None:
        if not (upper / "etc/resolv.conf").is_fifo():
            os.unlink("resolv.conf", dir_fd=directory)
            os.mkfifo("resolv.conf", dir_fd=directory)

    with open_directory(build.lent / "etc") as lent:
        assert merging._read_regular_file("resolv.conf", lent) == OURS["etc/resolv.conf"].encode()
    swapped(monkeypatch, "resolv.conf", pipe)
    with ThreadPoolExecutor(1) as pool, open_directory(upper / "etc") as etc:
        reading = pool.submit(merging._read_regular_file, "resolv.conf", etc)
        try:
            assert reading.result(10) is None
        finally:
            # Its other end: whoever waits for that goes on.
            os.close(os.open(upper / "etc/resolv.conf", os.O_RDWR | os.O_NONBLOCK))
    assert (upper / "etc/resolv.conf").is_fifo(), "it was swapped"


@pytest.mark.parametrize("size", [2 * MAX_BYTES, 2 * MAX_BYTES + 1])
def test_a_file_that_grows_as_it_is_read_is_read_no_further_than_its_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    upper = grow(tmp_path / "upper", {"hosts": "a"})
    swapped(monkeypatch, "hosts", lambda _: os.truncate(upper / "hosts", size))
    with open_directory(upper) as root:
        found = merging._read_regular_file("hosts", root)
    assert (found is None) == (size > 2 * MAX_BYTES)


# Certificates -----------------------------------------------------------------------------


def test_certificates_are_told_apart_by_what_they_are(tmp_path: Path) -> None:
    both = (
        "# a comment\n" + pem("one") + "\n" + pem("two") + pem("one").replace("\n", "\r\n")
    ).encode()
    first, second = certificates(both)
    assert without_certificates(both, [first]).replace(b"\r", b"").strip() == (
        f"# a comment\n\n{pem('two')}".encode().strip()
    )
    assert second != first


def test_a_key_store_has_each_certificate_and_its_digest() -> None:
    store = java_key_store((pem("one") + pem("two") + pem("x").replace("M", "*")).encode())
    assert store[:12] == bytes.fromhex("feedfeed 00000002 00000002")
    secret = "changeit".encode("utf-16-be") + b"Mighty Aphrodite"
    assert hashlib.sha1(secret + store[:-20]).digest() == store[-20:]

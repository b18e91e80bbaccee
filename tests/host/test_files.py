"""File operations in a real container, against what a tenant may have planted there."""

from __future__ import annotations

import pytest

from hostruntime.errors import FileConflict, FileTooLarge, InvalidRequest, NoSpace, NotFound
from hostruntime.wire.commands import Exec
from hostruntime.wire.files import DirectoryListing, FileContent
from hostruntime.wire.sandboxes import SandboxInfo
from tests.host.agent import Agent
from tests.host.client import HostClient
from tests.host.conftest import NewSandbox

pytestmark = [pytest.mark.host, pytest.mark.pythons]

ODD = bytes(range(256)) * 100


def content(host: HostClient, sandbox: SandboxInfo, path: str) -> bytes:
    found = host.read_path(sandbox.id, path)
    assert isinstance(found, FileContent)
    return found.content


def test_what_is_written_is_read_back(host: HostClient, sandbox: SandboxInfo) -> None:
    assert host.write_file(sandbox.id, "/workspace/odd.bin", ODD, mode=0o640) == len(ODD)
    found = host.read_path(sandbox.id, "/workspace/odd.bin")
    assert isinstance(found, FileContent)
    assert found.content == ODD
    assert (found.stat.size, found.stat.mode, found.stat.is_dir) == (len(ODD), 0o640, False)
    owner = host.exec(sandbox.id, Exec(["stat", "-c", "%U:%G %a", "/workspace/odd.bin"])).stdout
    assert owner == b"root:root 640\n"


def test_missing_parents_are_made_and_an_empty_file_is_a_file(
    host: HostClient, sandbox: SandboxInfo
) -> None:
    host.write_file(sandbox.id, "/workspace/a/b/c.txt", b"")
    assert content(host, sandbox, "/workspace/a/b/c.txt") == b""
    assert host.stat(sandbox.id, "/workspace/a/b/c.txt").mode == 0o644


def test_rewriting_keeps_mode_and_owner(host: HostClient, sandbox: SandboxInfo) -> None:
    host.exec(sandbox.id, Exec("echo old > f; chown 12:34 f; chmod 4755 f"))
    host.write_file(sandbox.id, "/workspace/f", b"new")
    found = host.exec(sandbox.id, Exec("stat -c '%a %u:%g' f; cat f; ls -A")).stdout
    assert found == b"4755 12:34\nnewf\n"


def test_relative_paths_are_below_the_workspace(host: HostClient, sandbox: SandboxInfo) -> None:
    host.write_file(sandbox.id, "rel.txt", b"r")
    assert content(host, sandbox, "/workspace/rel.txt") == b"r"


def test_a_directory_is_listed_by_name(host: HostClient, sandbox: SandboxInfo) -> None:
    host.exec(
        sandbox.id, Exec("mkdir d d/sub; echo 123 > d/b; ln -s sub d/link; ln -s nowhere d/a")
    )
    found = host.read_path(sandbox.id, "/workspace/d")
    assert isinstance(found, DirectoryListing)
    listed = [(entry.name, entry.is_dir) for entry in found.entries]
    assert listed == [("a", False), ("b", False), ("link", True), ("sub", True)]
    assert found.entries[1].size == 4


def test_links_lead_where_they_do_inside_never_to_the_host(
    host: HostClient, sandbox: SandboxInfo
) -> None:
    host.exec(
        sandbox.id,
        Exec("ln -s /etc/hostname h; ln -s ../../../../../../etc up; ln -s /proc/1/root r"),
    )
    inside = host.exec(sandbox.id, Exec("cat /etc/hostname")).stdout
    for path in ("h", "up/hostname", "r/etc/hostname"):
        assert content(host, sandbox, f"/workspace/{path}") == inside
    host.write_file(sandbox.id, "/workspace/up/planted", b"inside")
    assert host.exec(sandbox.id, Exec("cat /etc/planted")).stdout == b"inside"


def test_writing_through_a_link_replaces_what_it_leads_to(
    host: HostClient, sandbox: SandboxInfo
) -> None:
    host.exec(sandbox.id, Exec("echo old > target; ln -s target link; ln -s new-one dangling"))
    host.write_file(sandbox.id, "/workspace/link", b"new")
    host.write_file(sandbox.id, "/workspace/dangling", b"made")
    found = host.exec(
        sandbox.id, Exec("readlink link; cat target; echo; readlink dangling; cat new-one")
    )
    assert found.stdout == b"target\nnew\nnew-one\nmade"


@pytest.mark.parametrize(
    ("make", "path"),
    [
        ("mkfifo p", "/workspace/p"),
        ("true", "/dev/zero"),
        ("ln -s loop loop", "/workspace/loop"),
        ("echo x > f", "/workspace/f/below"),
        ("ln -s /dev/tty t", "/workspace/t"),
    ],
)
def test_what_is_no_file_is_refused_not_waited_for(
    host: HostClient, sandbox: SandboxInfo, make: str, path: str
) -> None:
    host.exec(sandbox.id, Exec(make))
    with pytest.raises(FileConflict):
        host.read_path(sandbox.id, path)
    with pytest.raises(FileConflict):
        host.write_file(sandbox.id, path, b"x" * 1_000_000)


def test_a_directory_is_not_overwritten(host: HostClient, sandbox: SandboxInfo) -> None:
    host.exec(sandbox.id, Exec("mkdir d; touch d/kept"))
    with pytest.raises(FileConflict, match="a directory"):
        host.write_file(sandbox.id, "/workspace/d", b"x")
    assert host.stat(sandbox.id, "/workspace/d/kept").exists


def test_missing_is_told_apart(host: HostClient, sandbox: SandboxInfo) -> None:
    with pytest.raises(NotFound):
        host.read_path(sandbox.id, "/workspace/none")
    with pytest.raises(NotFound):
        host.delete_path(sandbox.id, "/workspace/none")
    with pytest.raises(NotFound):
        host.move(sandbox.id, "/workspace/none", "/workspace/other")
    assert not host.stat(sandbox.id, "/workspace/none").exists
    assert not host.stat(sandbox.id, "/etc/passwd/below").exists


def test_files_of_proc_are_read_though_they_have_no_size(
    host: HostClient, sandbox: SandboxInfo
) -> None:
    assert content(host, sandbox, "/proc/1/status").startswith(b"Name:")


@pytest.mark.parametrize("name", ["maps", "environ", "cmdline", "status", "fd", "mountinfo", "exe"])
def test_what_reads_files_tells_nothing_of_itself(
    host: HostClient, sandbox: SandboxInfo, name: str
) -> None:
    """Its memory map names the host's interpreter and libraries, its descriptors the agent's."""
    for way in ("self", "thread-self"):
        with pytest.raises(NotFound, match="not part of the sandbox"):
            content(host, sandbox, f"/proc/{way}/{name}")


def test_a_file_over_the_cap_is_refused_and_a_stream_is_not(
    agent: Agent, host: HostClient, sandbox: SandboxInfo
) -> None:
    host.exec(sandbox.id, Exec("head -c 2000000 /dev/zero > big"))
    with pytest.raises(FileTooLarge, match="2000000"):
        host.read_path(sandbox.id, "/workspace/big", max_bytes=1_999_999)
    assert len(content(host, sandbox, "/workspace/big")) == 2_000_000


def test_a_large_file_streams_in_and_comes_back_whole(
    host: HostClient, sandbox: SandboxInfo
) -> None:
    piece = b"0123456789abcdef" * 65536
    size = host.write_file(sandbox.id, "/workspace/huge", (piece for _ in range(40)))
    assert size == 40 * 1024 * 1024
    found = host.read_path(sandbox.id, "/workspace/huge", max_bytes=size)
    assert isinstance(found, FileContent)
    assert (found.stat.size, found.content) == (size, piece * 40)


def test_no_space_left_is_said_and_leaves_the_old_file(
    host: HostClient, new_sandbox: NewSandbox
) -> None:
    sandbox = new_sandbox(memory_mb=64)
    host.write_file(sandbox.id, "/tmp/f", b"old")
    with pytest.raises(NoSpace, match="no space"):
        host.write_file(sandbox.id, "/tmp/f", b"x" * (40 * 1024 * 1024))
    assert host.exec(sandbox.id, Exec("cat /tmp/f; ls -A /tmp")).stdout == b"oldf\n"


def test_an_upload_that_breaks_off_leaves_nothing(host: HostClient, sandbox: SandboxInfo) -> None:
    def broken() -> object:
        yield b"begun"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        host.write_file(sandbox.id, "/workspace/f", broken())  # type: ignore[arg-type]
    for _ in range(100):
        listed = host.exec(sandbox.id, Exec("ls -A")).stdout
        if listed == b"":
            return
    raise AssertionError(f"left behind: {listed!r}")


def test_deleting_takes_files_links_and_whole_directories(
    host: HostClient, sandbox: SandboxInfo
) -> None:
    host.exec(sandbox.id, Exec("mkdir -p d/e/f; touch d/e/g kept; ln -s ../kept d/l; ln -s d link"))
    host.delete_path(sandbox.id, "/workspace/link")
    host.delete_path(sandbox.id, "/workspace/d")
    assert host.exec(sandbox.id, Exec("ls -A")).stdout == b"kept\n"


@pytest.mark.parametrize("path", ["/workspace", "/tmp", "/", "/proc", "/sys"])
def test_what_is_mounted_is_not_deleted(host: HostClient, sandbox: SandboxInfo, path: str) -> None:
    host.exec(sandbox.id, Exec("touch kept"))
    with pytest.raises(FileConflict):
        host.delete_path(sandbox.id, path)
    assert host.exec(sandbox.id, Exec("ls")).stdout == b"kept\n"


def test_directories_are_made(host: HostClient, sandbox: SandboxInfo) -> None:
    host.mkdir(sandbox.id, "/workspace/a/b", parents=True)
    host.mkdir(sandbox.id, "/workspace/a/b", parents=True)
    assert host.stat(sandbox.id, "/workspace/a/b").is_dir
    with pytest.raises(FileConflict):
        host.mkdir(sandbox.id, "/workspace/a/b", parents=False)
    with pytest.raises(NotFound):
        host.mkdir(sandbox.id, "/workspace/x/y", parents=False)


def test_moving_works_between_the_two_writable_file_systems(
    host: HostClient, sandbox: SandboxInfo
) -> None:
    host.exec(
        sandbox.id,
        Exec("mkdir -p d/e; echo 1 > d/e/f; ln -s f d/e/l; chmod 750 d; echo old > /tmp/g"),
    )
    host.move(sandbox.id, "/workspace/d", "/tmp/d")
    found = host.exec(
        sandbox.id, Exec("ls -A; readlink /tmp/d/e/l; cat /tmp/d/e/l; stat -c %a /tmp/d")
    )
    assert found.stdout == b"f\n1\n750\n"
    host.move(sandbox.id, "/tmp/d/e/f", "/tmp/g")
    assert content(host, sandbox, "/tmp/g") == b"1\n"


def test_moving_onto_a_directory_or_into_nowhere_is_refused(
    host: HostClient, sandbox: SandboxInfo
) -> None:
    host.exec(sandbox.id, Exec("mkdir d; echo 1 > f"))
    with pytest.raises(FileConflict):
        host.move(sandbox.id, "/workspace/f", "/workspace/d")
    with pytest.raises(NotFound):
        host.move(sandbox.id, "/workspace/f", "/workspace/none/f")
    assert content(host, sandbox, "/workspace/f") == b"1\n"


@pytest.mark.parametrize("path", ["a\0b", "x" * 5000])
def test_impossible_paths_are_refused(host: HostClient, sandbox: SandboxInfo, path: str) -> None:
    with pytest.raises(InvalidRequest):
        host.read_path(sandbox.id, path)
    with pytest.raises(InvalidRequest):
        host.write_file(sandbox.id, path, b"")


def test_what_root_inside_may_not_change_is_refused(host: HostClient, sandbox: SandboxInfo) -> None:
    with pytest.raises(FileConflict):
        host.write_file(sandbox.id, "/sys/kernel/x", b"")
    with pytest.raises((FileConflict, NotFound)):
        host.write_file(sandbox.id, "/proc/sys/kernel/hostname", b"x")

"""A backup that is made beside work that goes on, and the same work on another, empty installation.

The second one has a var and a state directory of its own, another port, and nothing else.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from orkestr import OrkestrClient, Sandbox, Volume

from orkestr_console.runner.backup import manifest
from tests.clients.making import Sandboxes, Templates
from tests.stack import Stack, wait_for

STEPS = (
    "echo kept > /root/kept && chown 1234:99 /root/kept && ln /root/kept /root/again",
    "cp /bin/ping /root/ping && setcap cap_net_raw+ep /root/ping || true",
    "truncate -s 64M /root/holes && echo end >> /root/holes",
)


def manage(stack: Stack, *words: str, status: int = 0) -> str:
    done = stack.manage(*words)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture
def place(stack: Stack) -> Iterator[Path]:
    """Where the backups go: beside the installation, not in it."""
    with tempfile.TemporaryDirectory(prefix="orkestr-backup-", dir="/var/tmp") as directory:
        yield Path(directory) / "kept"


@pytest.fixture
def second() -> Iterator[Stack]:
    """An installation that does not exist yet; whatever becomes of it is removed."""
    var = Path(tempfile.mkdtemp(prefix="orkestr-second-", dir="/var/tmp"))
    other = Stack(var)
    try:
        yield other
    finally:
        other.close()


def allocated(place: Path) -> int:
    """What a directory takes on the disk, each inode once, as du(1) counts it."""
    done = subprocess.run(["du", "-s", "-k", place], capture_output=True, text=True, check=True)
    return int(done.stdout.split()[0]) * 1024


def sign_in(stack: Stack, password: str) -> str:
    """Which page somebody comes to who signs in, and then asks for the templates."""
    with httpx.Client(base_url=stack.url, trust_env=False, follow_redirects=True) as browser:
        form = browser.get("/sign-in/").text
        token = form.partition('name="csrfmiddlewaretoken" value="')[2].partition('"')[0]
        fields = {"email": stack.credentials.user, "password": password}
        browser.post("/sign-in/", data={**fields, "csrfmiddlewaretoken": token})
        return browser.get("/templates/").url.path


def test_a_backup_serves_again_on_an_empty_installation(
    stack: Stack,
    templates: Templates,
    sandboxes: Sandboxes,
    place: Path,
    second: Stack,
) -> None:
    made = templates.ready("debian-12", *STEPS)
    source = sandboxes.boot(made, volume="backed-up")
    source.exec("echo more >> /root/kept; echo work > /workspace/file; echo data > /persist/file")
    snapshot = source.snapshot()
    of_base = sandboxes.boot("debian-12")
    of_base.exec("echo base > /root/base")
    base_snapshot = of_base.snapshot()
    building = templates.create("debian-12", "sleep 900")
    wait_for(
        lambda: any(event["kind"] == "step_started" for event in templates.events(building)), 60
    )
    assert "Backup 2" in manage(stack, "backup", str(place))
    # Work went on, and goes on.
    assert source.exec("cat /root/kept").stdout == "kept\nmore\n"
    templates.client.post(f"/v1/templates/{building}/cancel")
    templates.finished(building)
    password, api_key = stack.credentials.password, stack.credentials.api_key
    assert "Restored" in manage(second, "restore", str(place))
    second.start()
    assert second.credentials.api_key == api_key
    assert second.layout.port != stack.layout.port
    assert sign_in(second, "wrong") == "/sign-in/"
    assert sign_in(second, password) == "/templates/"
    with OrkestrClient(api_key=api_key, base_url=second.url) as client:
        check_what_came_back(client, made, snapshot.id, base_snapshot.id)
        booted = Sandboxes(client)
        try:
            # Copied while its sandbox was using it.
            again = booted.boot("debian-12", volume="backed-up")
            assert again.exec("cat /persist/file").stdout == "data\n"
        finally:
            booted.terminate_all()
        # What ran is not in a backup, and nothing says that it runs.
        assert Sandbox.get(source.id, client=client).status == "terminated"
    with second.client() as plain:
        assert Templates(plain).finished(building)["error_code"] == "host_lost"
    assert "nothing is reconciled" not in (second.layout.log / "worker.log").read_text()
    # And it can be backed up itself, into the same directory: nothing of it is new.
    assert " 0 new." in manage(second, "backup", str(place))
    source.terminate()
    with OrkestrClient(api_key=api_key, base_url=stack.url) as client:
        [volume] = [one for one in Volume.list(client=client) if one.name == "backed-up"]
        Volume.delete(volume.id, client=client)


def check_what_came_back(client: OrkestrClient, made: str, taken: str, of_base: str) -> None:
    booted = Sandboxes(client)
    try:
        fresh = booted.boot(made)
        assert fresh.exec("cat /root/kept /root/again").stdout == "kept\nkept\n"
        assert fresh.exec("stat -c '%u %g %h' /root/kept").stdout == "1234 99 2\n"
        assert fresh.exec("stat -c '%s' /root/holes").stdout == f"{64 * 1024**2 + 4}\n"
        assert int(fresh.exec("stat -c '%b' /root/holes").stdout) < 1024
        for snapshot, expected in ((taken, "kept\nmore\nwork\n"), (of_base, "base\n")):
            again = Sandbox.create(snapshot=snapshot, client=client)
            booted.booted.append(again)
            files = "/root/base" if snapshot == of_base else "/root/kept /workspace/file"
            assert again.exec(f"cat {files}").stdout == expected
    finally:
        booted.terminate_all()


def test_a_second_backup_copies_only_what_is_new(
    stack: Stack, templates: Templates, place: Path
) -> None:
    first = templates.ready("debian-12", "head -c 9000000 /dev/urandom > /root/first")
    manage(stack, "backup", str(place))
    before = allocated(place)
    # Its own files are new, and those of its base are there already.
    templates.ready(first, "head -c 5000000 /dev/urandom > /root/second")
    said = manage(stack, "backup", str(place))
    assert " 1 new." in said
    assert 5_000_000 <= allocated(place) - before < 60_000_000
    assert "Everything is what was put there" in manage(stack, "backup", "--verify", str(place))
    # Closed to everybody else, whatever is in it.
    assert place.stat().st_mode & 0o777 == 0o700
    # What none of the kept ones names goes.
    assert len(manifest.backups(place)) == 2
    manage(stack, "backup", "--keep", "1", str(place))
    assert len(manifest.backups(place)) == 1


def test_a_damaged_backup_is_refused_by_name_before_anything_changes(
    stack: Stack, templates: Templates, place: Path, second: Stack
) -> None:
    templates.ready("debian-12", "echo kept > /root/to-be-damaged")
    manage(stack, "backup", str(place))
    (kept,) = place.glob("images/img_*/content/tree/root/to-be-damaged")
    image = kept.relative_to(place).parts[1]
    kept.write_text("KEPT\n")
    assert f"images/{image}: it is not what was put there" in manage(
        stack, "backup", "--verify", str(place), status=1
    )
    assert f"images/{image}" in manage(second, "restore", str(place), status=1)
    assert not second.layout.state_dir.exists()
    assert not second.layout.cluster.data.exists()
    kept.write_text("kept\n")
    (newest,) = manifest.backups(place)
    dump = newest / manifest.DUMP
    os.truncate(dump, dump.stat().st_size - 1)
    assert f"{newest.name}/{manifest.DUMP}" in manage(second, "restore", str(place), status=1)
    assert not second.layout.cluster.data.exists()


def killed(stack: Stack, sign: Callable[[], bool], *words: str) -> None:
    """Start a command, and `kill -9` it as soon as there is a sign that it is at work."""
    process = subprocess.Popen(
        [sys.executable, "manage.py", *words],
        cwd=stack.layout.tree,
        env=stack.environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    wait_for(lambda: sign() or process.poll() is not None, 120)
    process.kill()
    assert process.wait() == -signal.SIGKILL


def test_nothing_half_counts_and_a_repeat_finishes_it(
    stack: Stack, templates: Templates, place: Path, second: Stack
) -> None:
    made = templates.ready("debian-12", "echo kept > /root/kept")
    killed(stack, lambda: any(place.glob("images/*")), "backup", str(place))
    assert "no whole backup" in manage(second, "restore", str(place), status=1)
    copied = {path: path.stat().st_ino for path in place.glob("images/*")}
    manage(stack, "backup", str(place))
    assert copied.items() <= {p: p.stat().st_ino for p in place.glob("images/*")}.items()
    # Killed while images are copied, and while the database is made.
    for sign in (second.layout.state_dir / "images", second.layout.cluster.data):
        killed(second, sign.exists, "restore", str(place))
        assert "was not finished" in manage(second, "up", "--no-self-check", status=1)
    manage(second, "restore", str(place))
    second.start()
    with OrkestrClient(api_key=second.api_key, base_url=second.url) as client:
        booted = Sandboxes(client)
        assert booted.boot(made).exec("cat /root/kept").stdout == "kept\n"
        booted.terminate_all()
    # One that does not run is backed up too.
    second.stop()
    assert " 0 new." in manage(second, "backup", str(place))


def test_a_restore_replaces_nothing(stack: Stack, templates: Templates, place: Path) -> None:
    manage(stack, "backup", str(place))
    assert "already runs" in manage(stack, "restore", str(place), status=1)
    assert "is inside ORKESTR_VAR" in manage(
        stack, "backup", str(stack.layout.var / "backup"), status=1
    )
    shutil.rmtree(place / manifest.backups(place)[0].name)
    assert "no whole backup" in manage(stack, "restore", str(place), status=1)

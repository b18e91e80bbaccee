"""A state directory beside a database that is not its own: nothing is lost, and all comes back."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from orkestr import OrkestrClient, Sandbox

from tests.clients.making import Sandboxes, Templates
from tests.stack import Stack

DAY = 86_400.0
# What the worker does by the clock, at once, and as often as it would in an hour.
PASSES = """
from sandboxes_app import tasks
from templates_app.tasks import reconcile_images
for _ in range(5):
    tasks.tidy()
    reconcile_images()
"""


def manage(stack: Stack, *words: str, status: int = 0) -> str:
    done = stack.manage(*words)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


def make_old(path: Path, *keys: str) -> None:
    """What is young is spared by every pass, which is not what is to be seen here."""
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {key: time.time() - DAY for key in keys}))


@pytest.fixture
def database_back(stack: Stack) -> Iterator[None]:
    """Whatever a test does with the database, the next one has the right one."""
    kept, aside = stack.layout.console_json.read_bytes(), stack.layout.var / "pg.aside"
    yield
    if aside.exists():
        stack.stop()
        put_back(stack, kept)
        stack.start()


def put_back(stack: Stack, credentials: bytes) -> None:
    data = stack.layout.cluster.data
    data.rename(stack.layout.var / "pg.strange")
    (stack.layout.var / "pg.aside").rename(data)
    stack.layout.console_json.write_bytes(credentials)
    shutil.rmtree(stack.layout.var / "pg.strange")


def test_beside_an_empty_database_nothing_is_lost(
    stack: Stack,
    templates: Templates,
    sandboxes: Sandboxes,
    sdk: OrkestrClient,
    database_back: None,
) -> None:
    state, kept = stack.layout.state_dir, stack.layout.console_json.read_bytes()
    made = templates.ready("debian-12", "echo kept > /root/kept")
    running = sandboxes.boot(made, timeout_seconds=3600)
    running.exec("echo more >> /root/kept")
    snapshot = running.snapshot()
    manage(stack, "shell", "-c", PASSES)
    images = set(state.glob("images/img_*"))
    assert images
    stack.stop()
    for image in images:
        make_old(image / "image.json", "created_at")
    make_old(state / f"snapshots/{snapshot.id}/snapshot.json", "created_at")
    make_old(state / f"sandboxes/{running.id}/sandbox.json", "started_at")
    stack.layout.cluster.data.rename(stack.layout.var / "pg.aside")
    stack.start()
    said = manage(stack, "shell", "-c", PASSES)
    assert "nothing is reconciled" in said
    assert set(state.glob("images/img_*")) == images
    assert (state / f"snapshots/{snapshot.id}/disk.ext4").is_file()
    with stack.host() as host:
        assert host.sandbox(running.id).state == "running"
        assert host.quarantine() == []
    assert "belongs to another installation" in manage(stack, "doctor", status=1)
    assert "belongs to another installation" in (stack.layout.log / "agent.log").read_text()
    # The right one is put back beside it.
    stack.stop()
    put_back(stack, kept)
    stack.start()
    manage(stack, "shell", "-c", PASSES)
    assert manage(stack, "installation", "show")
    assert Sandbox.get(running.id, client=sdk).exec("cat /root/kept").stdout == "kept\nmore\n"
    assert sandboxes.boot(made).exec("cat /root/kept").stdout == "kept\n"
    again = Sandbox.create(snapshot=snapshot.id, client=sdk)
    sandboxes.booted.append(again)
    assert again.exec("cat /root/kept").stdout == "kept\nmore\n"


def test_an_image_that_no_row_names_comes_back_from_quarantine(
    stack: Stack, templates: Templates, sandboxes: Sandboxes
) -> None:
    """As it is after an operator has accepted an older database."""
    made = templates.ready("debian-12", "echo kept > /root/kept")
    find = f"from templates_app.models import Template as T; t = T.objects.get(pk={made!r}); "
    image = manage(stack, "shell", "-v", "0", "-c", find + "print(t.image_id)").strip()
    make_old(stack.layout.state_dir / f"images/{image}/image.json", "created_at")
    manage(stack, "shell", "-c", find + "t.delete()")
    templates.made.remove(made)
    manage(stack, "shell", "-c", PASSES)
    assert not (stack.layout.state_dir / "images" / image).exists()
    assert f"image.{image}" in manage(stack, "quarantine", "list")
    assert f"image.{image} (unknown)" in manage(stack, "doctor")
    manage(stack, "quarantine", "restore", f"image.{image}")
    # It stays, though no row names it yet.
    manage(stack, "shell", "-c", PASSES)
    assert (stack.layout.state_dir / "images" / image).exists()
    program = "from templates_app.services import adopt_image\n"
    program += "from orkestr_console.accounts import models\n"
    team = "models.Team.objects.get(slug='demo')"
    again = manage(
        stack,
        "shell",
        "-v",
        "0",
        "-c",
        f"{program}print(adopt_image({team}, {image!r}, 'again').pk)",
    ).strip()
    templates.made.append(again)
    manage(stack, "shell", "-c", PASSES)
    assert templates.get(again)["status"] == "ready"
    assert sandboxes.boot(again).exec("cat /root/kept").stdout == "kept\n"


def test_an_image_that_is_gone_from_disk_is_said_and_rebuilt(
    stack: Stack, templates: Templates, sandboxes: Sandboxes
) -> None:
    made = templates.ready("debian-12", "echo again > /root/kept")
    find = f"from templates_app.models import Template as T; t = T.objects.get(pk={made!r}); "
    image = manage(stack, "shell", "-v", "0", "-c", find + "print(t.image_id)").strip()
    (stack.layout.state_dir / f"images/{image}/image.json").write_text("{}")
    manage(stack, "shell", "-c", PASSES)
    record = templates.get(made)
    assert (record["status"], record["error_code"]) == ("failed", "image_lost")
    assert f"image.{image} (damaged)" in manage(stack, "doctor")
    rebuilt = templates.ready("debian-12", "echo again > /root/kept")
    assert sandboxes.boot(rebuilt).exec("cat /root/kept").stdout == "again\n"
    manage(stack, "quarantine", "delete", f"image.{image}")
    assert manage(stack, "quarantine", "list").strip().endswith("Nothing is in quarantine.")

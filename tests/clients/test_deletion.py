"""Deleting a template under a running sandbox, and the disk space it gives back."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from tests.clients.making import Sandboxes, Templates
from tests.stack import Stack, wait_for

MEBIBYTE = 1024**2
BALLAST = 256 * MEBIBYTE
# Where what pip installs is, whatever directory a program is started in.
SITE = "$(python -c 'import site; print(site.getsitepackages()[0])')"
MODULE = "import math, pathlib; print(len(pathlib.Path('/root/ballast').read_bytes()))"


def used(path: Path) -> int:
    """Bytes that what is in ``path`` takes of the disk, as du(1) counts them: each file once.

    What a loop device still has open counts as well, although it has no name any more.
    """
    subprocess.run(["sync", "-f", path], check=True)
    command = ["du", "--summarize", "--one-file-system", "--block-size=1", str(path)]
    named = int(subprocess.run(command, capture_output=True, check=True).stdout.split()[0])
    return named + sum(size for name, size in loop_files() if name.is_relative_to(path))


def loop_files() -> Iterator[tuple[Path, int]]:
    """The deleted files that loop devices have open, and how large they can be."""
    for device in Path("/sys/block").glob("loop*"):
        with suppress(OSError):
            name = (device / "loop/backing_file").read_text().strip()
            if name.endswith(" (deleted)"):
                yield (
                    Path(name.removesuffix(" (deleted)")),
                    int((device / "size").read_text()) * 512,
                )


def test_a_template_is_deleted_under_a_sandbox_and_its_space_comes_back(
    stack: Stack, templates: Templates, sandboxes: Sandboxes
) -> None:
    state = stack.layout.state_dir
    # What earlier tests deleted is gone from the disk a little later.
    wait_for(lambda: not any((state / "trash").iterdir()), 30, stack.explain)
    before = used(state)
    template = templates.ready(
        "python-3.12-bare",
        f"head -c {BALLAST} /dev/urandom > /root/ballast",
        f"printf 'answer = 42\\n' > {SITE}/baked.py",
    )
    image = template_image(stack)
    assert used(state) - before > BALLAST * 0.9
    sandbox = sandboxes.boot(template)
    templates.delete(template)
    with stack.client() as client:
        assert client.get(f"/v1/templates/{template}").status_code == 404
        assert client.post("/v1/sandboxes", json={"template": template}).status_code == 404
    imported = sandbox.exec("python -c 'import baked; print(baked.answer)'")
    assert imported.stdout == "42\n", imported.stderr
    assert sandbox.exec(f'python -c "{MODULE}"').stdout == f"{BALLAST}\n"
    sandbox.terminate()
    wait_for(lambda: not image.exists(), 30, stack.explain)
    wait_for(lambda: not any((state / "trash").iterdir()), 30, stack.explain)
    wait_for(lambda: used(state) - before < 16 * MEBIBYTE, 30, stack.explain)


def template_image(stack: Stack) -> Path:
    """The directory of the newest template image in the store."""
    images = (stack.layout.state_dir / "images").glob("img_*")
    return max(images, key=lambda path: path.name)


def test_a_deleted_templates_slot_is_free_at_once(stack: Stack, templates: Templates) -> None:
    with stack.client() as client:
        before = len(client.get("/v1/templates").json()["templates"])
        template = templates.ready("debian-12", "true")
        assert len(client.get("/v1/templates").json()["templates"]) == before + 1
        templates.delete(template)
        assert len(client.get("/v1/templates").json()["templates"]) == before

"""Deleting a template under a running sandbox, and the disk space it gives back."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from tests.clients.making import Sandboxes, Templates
from tests.stack import Stack, wait_for

MEBIBYTE = 1024**2
BALLAST = 256 * MEBIBYTE
# Where what pip installs is, whatever directory a program is started in.
SITE = "$(python -c 'import site; print(site.getsitepackages()[0])')"
MODULE = "import math, pathlib; print(len(pathlib.Path('/root/ballast').read_bytes()))"


def used(path: Path) -> int:
    """Bytes in use on the filesystem of ``path``, as df(1) counts them."""
    subprocess.run(["sync", "-f", path], check=True)
    state = os.statvfs(path)
    return (state.f_blocks - state.f_bfree) * state.f_frsize


def test_a_template_is_deleted_under_a_sandbox_and_its_space_comes_back(
    stack: Stack, templates: Templates, sandboxes: Sandboxes
) -> None:
    state = stack.layout.state_dir
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
    wait_for(lambda: used(state) - before < 16 * MEBIBYTE, 30, stack.explain)
    wait_for(lambda: not any((state / "trash").iterdir()), 30, stack.explain)


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

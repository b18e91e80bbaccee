"""Recipes over the real package registries, a recipe that fails, and recipes that mean harm."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.clients.making import Sandboxes, Templates
from tests.stack import Stack


def test_apt_installs_through_the_restricted_network(
    templates: Templates, sandboxes: Sandboxes
) -> None:
    template = templates.ready(
        "debian-12", "apt-get update && apt-get install -y --no-install-recommends jq"
    )
    done = sandboxes.boot(template).exec("""echo '{"a": [1, 2]}' | jq -c .a""")
    assert (done.stdout, done.exit_code) == ("[1,2]\n", 0)


def test_npm_installs_through_the_restricted_network(
    templates: Templates, sandboxes: Sandboxes
) -> None:
    template = templates.ready("node-22", "npm install -g semver")
    done = sandboxes.boot(template).exec("semver -i minor 1.2.3")
    assert (done.stdout, done.exit_code) == ("1.3.0\n", 0), done.stderr


def test_a_template_builds_on_another_template(templates: Templates, sandboxes: Sandboxes) -> None:
    first = templates.ready("debian-12", "echo one > /root/first")
    second = templates.ready(first, "echo two > /root/second")
    done = sandboxes.boot(second).exec("cat /root/first /root/second")
    assert done.stdout == "one\ntwo\n"


def test_a_failing_step_stops_the_build_and_says_why(stack: Stack, templates: Templates) -> None:
    with stack.host() as host:
        before = host.health().counts
    disks = set((stack.layout.state_dir / "disks").glob("*.img"))
    images = set((stack.layout.state_dir / "images").iterdir())
    template = templates.create(
        "debian-12",
        "echo fine",
        "echo what went wrong; echo and why >&2; exit 7",
        "touch /root/never",
    )
    failed = templates.finished(template)
    assert failed["status"] == "failed"
    message = failed["error_message"]
    for part in ("2 of 3", "exit 7", "what went wrong", "and why", "7"):
        assert part in message, message
    assert [step["status"] for step in failed["steps"]] == ["succeeded", "failed", "skipped"]
    with stack.host() as host:
        counts = host.health().counts
    # What earlier tests have deleted may go meanwhile.
    assert {name: count for name, count in counts.items() if count > before[name]} == {}
    assert set((stack.layout.state_dir / "images").iterdir()) <= images
    assert set((stack.layout.state_dir / "disks").glob("*.img")) <= disks


def test_a_failed_template_cannot_be_booted(stack: Stack, templates: Templates) -> None:
    template = templates.create("debian-12", "false")
    assert templates.finished(template)["status"] == "failed"
    with stack.client() as client:
        answer = client.post("/v1/sandboxes", json={"template": template})
    assert answer.status_code == 409, answer.text


HOSTILE = (
    "echo injected >> /etc/passwd",
    "sed -i s/root/r00t/ /etc/group",
    "chmod -R 777 /etc && chown -R 33:33 /var/lib",
    "rm -rf /usr/share/doc /usr/share/perl5 /bin/ls",
    "for f in /etc/*.conf; do : > $f; done",
    "ln -f /etc/hostname /root/link && echo via-link > /root/link",
    'perl -e \'open F, "+<", "/usr/bin/env"; print F "#!"; close F\'',
    "touch -d 1999-01-01 /usr/bin/*",
    "mv /usr/bin /usr/bin-moved && ln -s bin-moved /usr/bin",
    "dd if=/dev/zero of=/usr/bin/cat bs=1 count=1 conv=notrunc",
)


def entries(tree: Path) -> Iterator[bytes]:
    """One line for each thing in a tree: everything a sandbox could observe of it.

    Link counts and change times are left out: sharing a file by a hard link changes those.
    """
    for directory, names, files in os.walk(tree):
        for name in sorted([*names, *files]):
            path = Path(directory, name)
            status = path.lstat()
            content = b""
            if stat.S_ISREG(status.st_mode):
                content = hashlib.sha256(path.read_bytes()).digest()
            elif stat.S_ISLNK(status.st_mode):
                content = os.fsencode(path.readlink())
            attributes = [
                (key, os.getxattr(path, key, follow_symlinks=False))
                for key in sorted(os.listxattr(path, follow_symlinks=False))
            ]
            owner = (status.st_mode, status.st_uid, status.st_gid, status.st_size)
            yield repr((path, owner, status.st_mtime_ns, content, attributes)).encode()


def digest(tree: Path) -> str:
    whole = hashlib.sha256()
    for entry in sorted(entries(tree)):
        whole.update(entry)
    return whole.hexdigest()


def test_no_recipe_changes_its_base(stack: Stack, templates: Templates) -> None:
    tree = stack.layout.state_dir / "images" / "debian-12" / "tree"
    before = digest(tree)
    outcomes = {step: templates.finished(templates.create("debian-12", step)) for step in HOSTILE}
    everything = templates.finished(templates.create("debian-12", *HOSTILE))
    assert digest(tree) == before
    assert {step for step, found in outcomes.items() if found["status"] == "ready"}, outcomes
    assert everything["status"] in {"ready", "failed"}


def test_no_package_manager_changes_its_base(stack: Stack, templates: Templates) -> None:
    """They rewrite, remove and compile anew what the base brought, in place where they can."""
    tree = stack.layout.state_dir / "images" / "python-3.12" / "tree"
    before = digest(tree)
    site = "$(python -c 'import requests; print(requests.__path__[0])')"
    templates.ready(
        "python-3.12",
        "pip install --force-reinstall requests",
        f"echo '# ours' >> {site}/api.py; touch {site}/*; chmod 600 {site}/models.py",
        "python -m compileall -q -f /usr/local/lib/python3.12/json",
        "pip uninstall -y tqdm",
    )
    assert digest(tree) == before


@pytest.mark.parametrize("step", ["kill -9 $$", "kill -SEGV $$"])
def test_a_step_killed_by_a_signal_is_said_to_be(templates: Templates, step: str) -> None:
    failed = templates.finished(templates.create("debian-12", step))
    assert failed["status"] == "failed"
    assert "signal" in failed["error_message"]

"""What is tried of the kernel fails for real where it cannot work, and leaves nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hostruntime.container import trials
from hostruntime.container.trials import TRIALS, run_trial
from hostruntime.host.kernel import mount_points_under
from tests.host.network import wait_until

pytestmark = pytest.mark.host

TREE = Path(__file__).resolve().parents[2]


def loops_of(directory: Path) -> list[str]:
    """The loop devices whose file is in a directory, or was before it lost its name."""
    found = []
    for path in Path("/sys/block").glob("loop*/loop/backing_file"):
        try:
            text = path.read_text()
        except OSError:
            continue  # It was freed just now.
        if text.startswith(f"{directory}/"):
            found.append(text)
    return found


def left_by(directory: Path) -> list[str]:
    groups = [str(path) for path in trials._CGROUPS.rglob("orkestr-trial-*")]
    mounts = [str(path) for path in mount_points_under(directory)]
    return [*map(str, directory.iterdir()), *loops_of(directory), *groups, *mounts]


@pytest.mark.parametrize("name", TRIALS)
def test_this_machine_can_do_it_and_nothing_is_left(name: str, tmp_path: Path) -> None:
    assert run_trial(TRIALS[name], tmp_path) is None
    wait_until(lambda: left_by(tmp_path) == [], 5)


def test_a_trial_that_is_killed_leaves_nothing(tmp_path: Path) -> None:
    def die_with_a_disk(directory: Path) -> None:
        trials.overlay(directory)
        assert loops_of(tmp_path)
        os.kill(os.getpid(), signal.SIGKILL)

    assert run_trial(die_with_a_disk, tmp_path) == "it was killed by signal 9"
    wait_until(lambda: left_by(tmp_path) == [], 5)


def test_a_trial_is_followed_and_given_up_on_only_when_it_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trials, "_SECONDS", 0.5)

    def work(_: Path) -> None:
        while time.process_time() < 1.5:
            pass

    assert run_trial(work, tmp_path) is None
    said = run_trial(lambda _: time.sleep(600), tmp_path)
    assert said is not None
    assert said.startswith("it did nothing for 0.5 s (")


def in_a_user_namespace_without(kind: str, directory: Path) -> dict[str, str | None]:
    """The trials' answers to a root that may make no namespaces of a kind (namespaces(7))."""
    script = f"echo 0 >/proc/sys/user/max_{kind}_namespaces && exec {sys.executable} -m "
    argv = ["unshare", "--user", "--map-root-user", "sh", "-c"]
    argv.append(f"{script} hostruntime.container.trials {directory}")
    done = subprocess.run(argv, cwd=TREE, capture_output=True, check=True)
    answers = map(json.loads, done.stdout.splitlines())
    return {answer["name"]: answer["error"] for answer in answers}


def test_a_kernel_that_makes_no_namespaces_says_so(tmp_path: Path) -> None:
    errors = in_a_user_namespace_without("user", tmp_path)
    assert errors["openat2"] is None
    for name in ("user namespaces", "setns"):
        assert "refused" in str(errors[name])


def test_a_root_of_less_than_the_machine_fails_by_each_thing_it_may_not(tmp_path: Path) -> None:
    errors = in_a_user_namespace_without("net", tmp_path)
    assert "No space left" in str(errors["network"])
    for name in ("id-mapped mounts", "loop devices", "overlay"):
        assert errors[name] is not None, name


def test_a_read_only_hierarchy_kills_nothing(tmp_path: Path) -> None:
    mount = "mount -t tmpfs -o ro none /sys/fs/cgroup"
    call = "from hostruntime.container.trials import *; print(run_trial(cgroup_kill, Path('/')))"
    argv = ["unshare", "--mount", "sh", "-c", f'{mount} && exec {sys.executable} -c "{call}"']
    done = subprocess.run(argv, cwd=TREE, capture_output=True, text=True, check=True)
    assert "Read-only file system" in done.stdout

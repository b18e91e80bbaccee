"""The installer, its functions run one by one; sudo, apt and dpkg are programs of the test's."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from orkestr_console.runner.layout import TREE
from tests.stack import free_port

SCRIPT = TREE / "orkestr_console/runner/bootstrap.sh"
SOMEBODY = 54_321
PROXIES = {"https_proxy": "http://proxy.example:3128", "NO_PROXY": "localhost,.example"}


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """A directory to put programs into, which come first; anybody may look into it."""
    for path in (tmp_path, *tmp_path.parents[:2]):
        path.chmod(0o755)
    return tmp_path


def program(programs: Path, name: str, text: str) -> None:
    path = programs / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def bash(
    programs: Path, text: str, *, user: int | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run functions of the installer."""
    path = f"{programs}:{os.environ['PATH']}"
    # Handed over as text, as the clone may be closed to `user`.
    source = SCRIPT.read_text().replace('"${BASH_SOURCE[0]}"', '"$here"')
    sourced = source.replace('[ "$here" = "$0" ] || return 0', "return 0")
    assert sourced != source
    (programs / "bootstrap.sh").write_text(sourced)
    command = f"here={SCRIPT}; . {programs}/bootstrap.sh; {text}"
    return subprocess.run(
        ["bash", "-c", command],
        cwd="/",
        user=user,
        env={"PATH": path, **environment},
        capture_output=True,
        text=True,
    )


def closed() -> str:
    """An address on this machine where nothing listens."""
    return f"http://127.0.0.1:{free_port()}"


def test_sudo_is_given_the_proxies_that_it_would_drop(programs: Path) -> None:
    program(programs, "sudo", 'exec env -i PATH="$PATH" "$@"')
    done = bash(programs, "as_root printenv https_proxy NO_PROXY", user=SOMEBODY, **PROXIES)
    assert done.stdout.splitlines() == list(PROXIES.values()), done.stderr


def test_sudo_is_asked_for_the_command_alone_where_there_is_no_proxy(programs: Path) -> None:
    program(programs, "sudo", 'echo "sudo $*"')
    assert bash(programs, "as_root apt-get update", user=SOMEBODY).stdout == "sudo apt-get update\n"


def test_root_needs_no_sudo(programs: Path) -> None:
    program(programs, "sudo", "exit 9")
    assert bash(programs, "as_root echo done").stdout == "done\n"


def test_a_machine_without_lists_is_updated_before_apt_is_asked_for_a_python(
    programs: Path,
) -> None:
    """Once, however many packages are then installed."""
    program(programs, "apt-get", f'echo "apt-get $*" >>{programs}/said; touch {programs}/lists')
    program(programs, "apt-cache", f"[ -e {programs}/lists ] && echo '  Candidate: 3.13'")
    program(programs, "dpkg-query", "exit 1")
    program(programs, "systemctl", "exit 0")
    done = bash(programs, "hold_daemons() { :; }; install_python && update_lists")
    assert done.returncode == 0, done.stderr
    said = (programs / "said").read_text().splitlines()
    assert said[0] == "apt-get -q update"
    assert sum("update" in line for line in said) == 1
    assert said[1].endswith("python3.12 python3.12-venv python3.12-dev")


def test_another_apt_is_waited_for_and_what_else_fails_is_shown_at_once(programs: Path) -> None:
    """Debian's own apt-get, in directories of the test's: nothing of the machine is held."""
    lists = programs / "state" / "lists"
    (lists / "partial").mkdir(parents=True)
    (programs / "apt.conf").write_text(
        f'Dir::State "{programs}/state";\nDir::Cache "{programs}/cache";\n'
        f'Dir::Etc::SourceList "{programs}/none";\nDir::Etc::SourceParts "{programs}/none.d";\n'
    )
    (programs / "none.d").mkdir()
    holding = f"""
import fcntl, time
lock = open({str(lists / "lock")!r}, "w")
fcntl.lockf(lock, fcntl.LOCK_EX)
print("held", flush=True)
time.sleep(3)
"""
    holder = subprocess.Popen([sys.executable, "-c", holding], stdout=subprocess.PIPE)
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"held\n"
    conf = str(programs / "apt.conf")
    with holder:
        done = bash(programs, "update_lists", APT_CONFIG=conf)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("waiting for process") == 1
    (programs / "none").write_text("nonsense\n")
    done = bash(programs, "update_lists", APT_CONFIG=conf)
    assert done.returncode == 1
    assert "waiting" not in done.stdout
    assert "nonsense" in done.stderr or "Malformed" in done.stderr


def test_a_mirror_that_cannot_be_reached_is_named_in_one_sentence(programs: Path) -> None:
    """Debian's own apt-get again: an update that fetches nothing is no failure to it."""
    for name in ("state/lists/partial", "cache/archives/partial", "none.d"):
        (programs / name).mkdir(parents=True)
    (programs / "none").write_text(f"deb [trusted=yes] {closed()}/debian stable main\n")
    (programs / "apt.conf").write_text(
        f'Dir::State "{programs}/state";\nDir::Cache "{programs}/cache";\n'
        f'Dir::Etc::SourceList "{programs}/none";\nDir::Etc::SourceParts "{programs}/none.d";\n'
        'Acquire::Retries "0";\nAcquire::http::Proxy "DIRECT";\n'
    )
    program(programs, "dpkg-query", "exit 1")
    text = "hold_daemons() { :; }; install_packages some-package"
    done = bash(programs, text, APT_CONFIG=str(programs / "apt.conf"))
    assert done.returncode == 1
    (sentence,) = done.stderr.strip().splitlines()
    assert "some-package" in sentence
    assert "127.0.0.1" in sentence
    assert "refused" in sentence


def test_an_index_that_cannot_be_reached_is_named_in_one_sentence(programs: Path) -> None:
    venv, index = programs / "venv", closed()
    (venv / "bin").mkdir(parents=True)
    real = f'exec {sys.executable} "$@"'
    text = f'case "$*" in *package_index*) {real};; esac; seq 200; seq 200 >&2; exit 1'
    program(venv / "bin", "python", text)
    text = f"venv={venv}; lock=none; profile=run; ensure_packages"
    done = bash(programs, text, PIP_INDEX_URL=f"{index}/simple", NO_PROXY="*")
    assert done.returncode == 1
    (sentence,) = done.stderr.strip().splitlines()
    assert f"{index}/simple refuses connections" in sentence
    assert f"{venv}/install.log" in sentence
    assert "trying all the same" in done.stdout
    assert (venv / "install.log").read_text().count("200") > 1


def test_what_takes_long_is_said_to_go_on_and_nothing_of_that_stays(programs: Path) -> None:
    text = "still_seconds=0.2; with_word_of fetching sleep 1 >/dev/null; jobs"
    done = bash(programs, text)
    assert done.stdout.count("fetching: still at it") >= 2
    assert bash(programs, "with_word_of x false").returncode == 1


def test_of_two_starts_of_one_clone_the_second_waits(programs: Path) -> None:
    clone = programs / "orkestr_console" / "runner"
    clone.mkdir(parents=True)
    (clone / "bootstrap.sh").touch()
    taken = f"repo={programs}; one_at_a_time"
    mark = "until [ -e {0} ]; do sleep 0.05; done".format
    first = (
        f"({taken}; echo first; touch {programs}/a; {mark(programs / 'b')}; sleep 1; echo done) &"
    )
    both = f"{first} {mark(programs / 'a')}; touch {programs}/b; {taken}; echo second; wait"
    said = bash(programs, both).stdout.splitlines()
    assert [said[0], *said[-2:]] == ["first", "done", "second"]
    assert "waiting for another start of this clone" in said[1]


@pytest.mark.parametrize(("first", "other"), [("3.12", "3.13"), ("3.13", "3.12")])
def test_the_other_python_is_the_one_that_is_not_in_use(
    programs: Path, first: str, other: str
) -> None:
    (programs / "bin").mkdir()
    program(programs / "bin", "python", f"echo {first}")
    choose = f"venv={programs}; repo={programs}; choose_other_python"
    done = bash(programs, f"{choose}; echo $versions $venv")
    assert done.stdout == f"{other} {programs}/.venv-other\n", done.stderr


def test_where_there_is_no_other_python_that_is_said_and_no_old_one_stays(programs: Path) -> None:
    old = programs / "venv"
    (old / "bin").mkdir(parents=True)
    program(old / "bin", "python", "exit 1")
    given = f"venv={old}; versions=3.13; find_python() {{ return 1; }}"
    nowhere = "install_python() { fail none is to be had; }"
    done = bash(programs, f"{given}; {nowhere}; other_python_can_be_had || echo not run")
    assert "none is to be had" in done.stderr
    said = "python 3.13: cannot be had here (above), so NOTHING IS TESTED ON IT"
    assert done.stdout == f"  {said}\nnot run\n"
    assert not old.exists()


def test_an_environment_that_is_roots_is_told_instead_of_half_installed(programs: Path) -> None:
    (programs / "venv" / "bin").mkdir(parents=True)
    done = bash(programs, f"venv={programs}/venv; ensure_venv", user=SOMEBODY)
    assert done.returncode == 1
    assert "venv belongs to root: start again as that user, or remove it" in done.stderr


def test_the_hold_of_a_run_that_was_killed_is_taken_off_and_anothers_is_not(
    programs: Path,
) -> None:
    policy = programs / "policy-rc.d"
    hold = f"installed() {{ :; }}; install() {{ :; }}; policy={policy}; hold_daemons"
    # Killed: it leaves the file.
    bash(programs, f"{hold}; kill -KILL $$")
    assert "exit 101" in policy.read_text()
    assert bash(programs, hold).returncode == 0
    assert not policy.exists()
    policy.write_text("#!/bin/sh\nexit 101\n")
    assert bash(programs, hold).returncode == 0
    assert policy.exists()


def test_what_is_installed_can_be_read_by_the_web_process(programs: Path) -> None:
    made = programs / "made"
    subprocess.run(
        ["bash", "-c", f"umask 077; here={SCRIPT}; . {SCRIPT}; touch {made}"], check=True
    )
    assert made.stat().st_mode & 0o777 == 0o644

"""Checks through the official SDK and REST: sandboxes, their walls, limits, networks, builds."""

from __future__ import annotations

import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from orkestr import Sandbox
from orkestr.errors import OrkestrError

from tests.host.attacks import kernel, surroundings
from tests.host.attacks.harness import Outcome, Table
from tests.vm.console import CALL_SECONDS, Clients, Console
from tests.vm.console import TREE as INSTALLED
from tests.vm.places import TREE, VmError

# Refused by its name before anybody resolves it: no packet leaves for it.
UNLISTED = "nowhere.invalid"
LIFE_SECONDS = 3600
BUILD_SECONDS = 3600.0
EXEC_SECONDS = 600
ATTACKS = "/workspace/attacks"
STATE = f"{INSTALLED}/var/host"
# Read with the tables: the tree may change in the half hour until they are compared.
PROGRAMS = {"tests/__init__.py": ""} | {
    str(path.relative_to(TREE)): path.read_text()
    for path in (TREE / "tests/host/__init__.py", *(TREE / "tests/host/attacks").glob("*.py"))
}
FETCH = f"python3 -c \"import urllib.request as u; u.urlopen('https://{UNLISTED}/x')\""
# Goes on after a fork that failed, so that it is this program which says how many there were.
FORKS = (
    "my @p; while (1) { my $p = fork; last unless defined $p; "
    "if (!$p) { sleep 900; exit } push @p, $p } "
    'print scalar(@p), " ", $!+0, "\\n"; kill 9, @p; wait for @p'
)
SPIN = "timeout 5 sh -c 'while :; do :; done' & timeout 5 sh -c 'while :; do :; done' & wait"
RECIPES = {
    "apt": (
        *("debian-12", "apt-get update && apt-get install -y --no-install-recommends jq"),
        *("""echo '{"a": [1, 2]}' | jq -c .a""", "[1,2]\n"),
    ),
    "pip": ("python-3.12", "pip install six", "python -c 'import six; print(six.PY3)'", "True\n"),
    "npm": ("node-22", "npm install -g semver", "semver -i minor 1.2.3", "1.3.0\n"),
}


def boot(clients: Clients, template: str, **options: Any) -> Sandbox:
    """A running sandbox. Raises the SDK's errors."""
    options = {"timeout_seconds": LIFE_SECONDS, "size": "small"} | options
    return Sandbox.create(template=template, client=clients.sdk, **options)


def run(sandbox: Sandbox, command: str) -> str:
    """What a command printed; AssertionError unless it succeeded."""
    done = sandbox.exec(command, timeout_seconds=EXEC_SECONDS)
    assert done.exit_code == 0, f"`{command}`: {done}"
    return str(done.stdout)


# What everybody does ------------------------------------------------------------------------


def commands_and_files(sandbox: Sandbox) -> None:
    """A command as root of the container, and files both ways."""
    assert run(sandbox, "id -u; pwd") == "0\n/workspace\n"
    sandbox.files.write("/workspace/notes.txt", "grüße\n")
    assert sandbox.files.read("/workspace/notes.txt") == "grüße\n"
    assert run(sandbox, "cat notes.txt; echo in >/root/kept; cat /root/kept") == "grüße\nin\n"
    assert "notes.txt" in [entry.name for entry in sandbox.files.list("/workspace")]


def overlay(sandbox: Sandbox) -> None:
    """What dpkg does to a file system, on directories of the image below."""
    run(
        sandbox,
        "cd /root && mkdir d && touch d/f && mv d e && ls e && "
        "mv /usr/share/doc /usr/share/doc2 && mv /usr/share/doc2 /usr/share/doc && "
        "echo x >x && ln x y && chown 1000:1000 y && test $(stat -c %u x) = 1000 && rm -r e x y",
    )


def pause_and_resume(clients: Clients, sandbox: Sandbox) -> None:
    """A process stands still and goes on, with what it has in memory."""
    run(
        sandbox,
        "(held=$(tr -dc a-f </dev/urandom | head -c 16); echo $held >/tmp/first; "
        "while [ ! -e /tmp/ask ]; do sleep 0.2; done; echo $held >/tmp/answer) "
        ">/dev/null 2>&1 & while [ ! -s /tmp/first ]; do sleep 0.2; done",
    )
    sandbox.pause()
    assert Sandbox.get(sandbox.id, client=clients.sdk).status == "paused"
    resumed = Sandbox.resume(sandbox.id, client=clients.sdk)
    assert resumed.status == "running"
    answer = run(
        sandbox,
        "touch /tmp/ask; while [ ! -s /tmp/answer ]; do sleep 0.2; done; "
        "cat /tmp/answer /tmp/first",
    ).split()
    assert len(answer[0]) == 16
    assert answer[0] == answer[1]


def snapshot_and_start(clients: Clients, sandbox: Sandbox) -> None:
    """Another sandbox starts with the files of the first."""
    run(sandbox, "echo before | tee /root/mark >/workspace/mark")
    taken = sandbox.snapshot(name="kept")
    run(sandbox, "echo after | tee /root/mark >/workspace/mark")
    fork = Sandbox.create(snapshot=taken.id, client=clients.sdk, timeout_seconds=LIFE_SECONDS)
    try:
        assert run(fork, "cat /root/mark /workspace/mark") == "before\nbefore\n"
    finally:
        fork.terminate()


# Walls --------------------------------------------------------------------------------------


def confinement(console: Console, sandbox: Sandbox) -> dict[str, Any]:
    """Init, a command and a file operation have one AppArmor label, enforced, and the filter."""
    init = console.container(sandbox.id)
    mover = file_operation(console, sandbox)
    seen = {
        "init": (init["label"], init["seccomp"]),
        "command": (
            run(sandbox, "cat /proc/self/attr/current").strip("\0\n "),
            _filter(run(sandbox, "cat /proc/self/status")),
        ),
        "file operation": (mover["label"], mover["seccomp"]),
    }
    assert len(set(seen.values())) == 1, seen
    assert init["seccomp"] == "2", seen
    assert init["label"].endswith("(enforce)"), seen
    assert re.search(r"ork", init["label"]), seen
    return init


def file_operation(console: Console, sandbox: Sandbox) -> dict[str, Any]:
    """A process that moves files, seen from the host: it shows nobody in there itself."""
    run(sandbox, "head -c 16M /dev/zero >/var/tmp/large")
    seen = threading.Event()

    def read() -> None:
        while not seen.is_set():
            sandbox.files.read_bytes("/var/tmp/large")

    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(read)
        try:
            return console.mover(sandbox.id)
        finally:
            seen.set()
            reading.result()


def _filter(status: str) -> str:
    found = re.search(r"^Seccomp:\t(\d)$", status, re.MULTILINE)
    assert found, status
    return found[1]


def not_in_a_session(init: dict[str, Any]) -> None:
    """The sandbox's group is below no login session, which logind may end."""
    assert "user.slice" not in init["cgroup"], init
    assert "session-" not in init["cgroup"], init


def attack(clients: Clients, console: Console, table: Table, program: str) -> int:
    """Run one program of the attack table in a sandbox; each attack fails as it has to."""
    sandbox = boot(clients, "python-3.12-bare", network="open")
    try:
        outcomes = _outcomes(console, sandbox, program)
    finally:
        sandbox.terminate()
    assert list(outcomes) == list(table), sorted(set(table) ^ set(outcomes))
    wrong = [
        f"{name}: {outcomes[name].result} {outcomes[name].detail[-300:]}"
        for name, attempt in table.items()
        if outcomes[name].result not in attempt.expected
    ]
    assert not wrong, "\n".join(wrong)
    return len(outcomes)


def _outcomes(console: Console, sandbox: Sandbox, program: str) -> dict[str, Outcome]:
    run(sandbox, f"mkdir -p {ATTACKS}/tests/host/attacks")
    sandbox.files.write_batch({f"{ATTACKS}/{name}": text for name, text in PROGRAMS.items()})
    told = {
        "HOST_PIDS": console.guest.root("pgrep -d: -f hostruntime.agent").out.strip(),
        "HOST_PATHS": ":".join([STATE, f"{STATE}/images", "/run/orkestr"]),
    }
    done = sandbox.exec(
        f"exec python3 -m tests.host.attacks.{program}",
        env={"PYTHONPATH": ATTACKS, "PYTHONDONTWRITEBYTECODE": "1", "ATTACK_SECONDS": "60", **told},
        timeout_seconds=int(CALL_SECONDS),
    )
    lines = done.stdout.splitlines()
    assert lines[-1:] == ["done"], f"{done.stdout[-500:]} {done.stderr[-3000:]}"
    found = [Outcome.parse(line) for line in lines[:-1]]
    return {outcome.name: outcome for outcome in found}


def kernel_attacks(clients: Clients, console: Console) -> int:
    """Attacks by system call."""
    return attack(clients, console, kernel.TABLE, "kernel")


def attacks_on_surroundings(clients: Clients, console: Console) -> int:
    """Attacks on devices, /proc, /sys, groups, ids, limits."""
    return attack(clients, console, surroundings.TABLE, "surroundings")


# Limits -------------------------------------------------------------------------------------


def limits_are_set(console: Console, sandbox: Sandbox) -> dict[str, str]:
    """The group of a small sandbox has its size's limits."""
    limits: dict[str, str] = console.container(sandbox.id)["limits"]
    expected = {"memory.max": "1073741824", "cpu.max": "100000 100000", "pids.max": "1024"}
    assert expected.items() <= limits.items(), limits
    assert limits["memory.swap.max"] == "0", limits
    return limits


def memory(console: Console, sandbox: Sandbox) -> None:
    """What takes more memory than there is is killed, counted, and told; the sandbox lives on."""
    before = _oom_kills(console, sandbox)
    try:
        done = sandbox.exec("tail /dev/zero", timeout_seconds=EXEC_SECONDS)
        assert done.exit_code == 137, done
    except OrkestrError as error:
        assert "memory" in str(error), error
    assert _oom_kills(console, sandbox) > before
    assert run(sandbox, "echo alive") == "alive\n"


def _oom_kills(console: Console, sandbox: Sandbox) -> int:
    events = console.container(sandbox.id)["counts"]["memory.events"]
    return int(re.search(r"^oom_kill (\d+)$", events, re.MULTILINE)[1])  # type: ignore[index]


def processes(sandbox: Sandbox) -> None:
    """The thousandth process or so is refused, with EAGAIN; afterwards there is room again."""
    made, code = map(int, run(sandbox, f"perl -e '{FORKS}'").split())
    assert 900 < made < 1024, made
    assert code == 11, code
    assert run(sandbox, "echo alive") == "alive\n"


def processor(console: Console, sandbox: Sandbox) -> None:
    """Two spinners get one processor between them, and the group says that it held them."""
    before = _cpu(console, sandbox)
    began = time.monotonic()
    run(sandbox, SPIN)
    passed = time.monotonic() - began
    after = _cpu(console, sandbox)
    assert after["nr_throttled"] > before["nr_throttled"], after
    assert (after["usage_usec"] - before["usage_usec"]) / 1e6 < passed * 1.3, (before, after)


def _cpu(console: Console, sandbox: Sandbox) -> dict[str, int]:
    lines = console.container(sandbox.id)["counts"]["cpu.stat"].splitlines()
    return {name: int(value) for name, value in map(str.split, lines)}


def disk(sandbox: Sandbox) -> None:
    """A disk is as large as it is said to be, and ENOSPC is this tenant's alone."""
    done = sandbox.exec(
        "fallocate -l 5G /root/a && fallocate -l 5G /root/b; s=$?; rm -f /root/a /root/b; exit $s",
        timeout_seconds=EXEC_SECONDS,
    )
    assert done.exit_code != 0, done
    assert "No space left on device" in done.stderr, done
    assert run(sandbox, "echo fine >/root/x; cat /root/x") == "fine\n"


# Networks and builds ------------------------------------------------------------------------


def refused_egress(clients: Clients, sandbox: Sandbox) -> None:
    """A host that is on no list: the proxy's 403, and a line in the sandbox's record."""
    done = sandbox.exec(FETCH, timeout_seconds=EXEC_SECONDS)
    assert "403" in done.stderr, done
    hosts = {row["host"]: row for row in clients.get(f"/v1/sandboxes/{sandbox.id}/egress")["hosts"]}
    assert hosts[UNLISTED]["reason"] == "not_listed", hosts
    assert not hosts[UNLISTED]["allowed"], hosts


def allowed_egress(sandbox: Sandbox) -> None:
    """pip's own index is on the default list."""
    run(sandbox, "cd /tmp && pip download --no-deps --quiet six && ls six*")


def build(clients: Clients, kind: str) -> str:
    """A template whose step uses a registry, and what it installed at work; its id."""
    base, step, command, expected = RECIPES[kind]
    template = make_template(clients, base, step)
    sandbox = boot(clients, template)
    try:
        assert run(sandbox, command) == expected
    finally:
        sandbox.terminate()
    return template


def make_template(clients: Clients, base: str, *recipe: str) -> str:
    """Build a template to its end; its id. AssertionError when it fails."""
    body = {"name": "tried", "base_template": base, "recipe": [*recipe], "network": "restricted"}
    answer = clients.http.post("/v1/templates", json=body)
    if answer.is_error:
        raise VmError(f"POST /v1/templates answered {answer.status_code}: {answer.text}")
    template = str(answer.json()["id"])
    deadline = time.monotonic() + BUILD_SECONDS
    while (record := clients.get(f"/v1/templates/{template}"))["status"] == "building":
        assert time.monotonic() < deadline, record
        time.sleep(2)
    assert record["status"] == "ready", record.get("error_message")
    return template

"""Kernels in a real container: what comes of a run, and who survives whom."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from hostruntime.container.cgroups import cgroup_layout, pids_under
from hostruntime.errors import (
    ContainerPaused,
    ContextBusy,
    ContextNotFound,
    CwdNotFound,
    InterpreterUnavailable,
    TooManyContexts,
)
from hostruntime.host.rundir import RUN_ROOT
from hostruntime.sandbox.interpreter import MAX_CONTEXTS
from hostruntime.wire.commands import Exec
from hostruntime.wire.interpreter import CreateContext, RunCode
from hostruntime.wire.sandboxes import CreateSandbox, SandboxInfo
from tests.host.agent import Agent, container_of, eventually
from tests.host.client import HostClient
from tests.host.interpreter import Ran, build_kernels, run
from tests.host.test_pause import far
from tests.host.warm import keeping_warm, waiting

pytestmark = pytest.mark.host

MEBIBYTE = 1024 * 1024
FIGURE = """
import matplotlib.pyplot as plt
plt.plot([1, 2], [3, 4], label="a"); plt.title("T"); plt.show()
from IPython.display import display, HTML, JSON, SVG
display(HTML("<b>x</b>")); display(JSON({"a": [1, None]}))
display(SVG('<svg xmlns="http://www.w3.org/2000/svg"></svg>'))
"""
SHOWN = """
display(Buffer.from([0x89, 0x50, 0x4e, 0x47, 1])); display.html("<b>x</b>")
display({"application/json": {a: 1}}, {raw: true})
"""
SLEEPING = "require('child_process').execSync('sleep 1000')"
DEAF = """
import time
def wait():
    while True:
        try:
            time.sleep(1000)
        except KeyboardInterrupt:
            pass
wait()
"""
BOMB = """
import os
while True:
    try:
        os.fork()
    except (OSError, KeyboardInterrupt):
        pass
"""


@pytest.fixture(scope="module")
def image(agent: Agent, bases: None) -> Iterator[str]:
    """An image that has ipykernel."""
    name = build_kernels(agent)
    yield name
    agent.client.delete_image(name)


@pytest.fixture(scope="module")
def kernels(agent: Agent, image: str) -> Iterator[SandboxInfo]:
    """One sandbox of it."""
    name = f"sbx_kernels{os.getpid()}"
    wishes = CreateSandbox(name, image=image, cpu=1.0, memory_mb=1024, env={"GREETING": "hello"})
    yield agent.client.create_sandbox(wishes)
    agent.client.delete_sandbox(name)


@pytest.fixture
def contexts(host: HostClient, kernels: SandboxInfo) -> Iterator[str]:
    """That sandbox; its contexts go away when the test ends."""
    yield kernels.id
    for each in host.contexts(kernels.id):
        host.remove_context(kernels.id, each.id)


def group_of(agent: Agent, sandbox_id: str, context: str) -> list[int]:
    groups = cgroup_layout().container(container_of(agent.state, sandbox_id))
    return list(pids_under(groups.background_group(f"code-{context}")))


def test_a_kernel_keeps_its_variables_and_says_what_they_are(
    host: HostClient, contexts: str
) -> None:
    first = run(
        host, contexts, "import os, sys\nx = 41\nprint(os.environ['GREETING'], os.getcwd())"
    )
    assert first.printed == {"stdout": "hello /workspace\n", "stderr": ""}
    assert (first.first.context_id, first.last.execution_count) == ("default", 1)
    second = run(host, contexts, "sys.stderr.write('err'); x + 1")
    assert (second.value, second.printed["stderr"]) == ("42", "err")
    assert (second.last.execution_count, second.last.restarted) == (2, False)
    failed = run(host, contexts, "def f(): 1 / 0\nf()")
    assert failed.error is not None
    assert (failed.error.name, failed.error.value) == ("ZeroDivisionError", "division by zero")
    assert "\x1b" not in "".join(failed.error.traceback)
    # What a thread prints while nothing runs comes with a later run.
    run(host, contexts, "import threading; threading.Timer(0.2, print, ['late']).start()")
    for _ in eventually():
        if run(host, contexts, "None").printed["stdout"] == "late\n":
            break
    plot, html, values, svg = run(host, contexts, FIGURE).results
    assert plot.png is not None
    assert plot.png.startswith("iVBOR")
    line = {"label": "a", "points": [[1, 3], [2, 4]]}
    chart = {"type": "line", "title": "T", "x_label": "", "y_label": "", "elements": [line]}
    assert plot.chart == chart
    assert html.html == "<b>x</b>"
    assert values.json == {"a": [1, None]}
    assert (svg.svg or "").startswith("<svg")
    [info] = host.contexts(contexts)
    assert (info.id, info.language, info.alive) == ("default", "python", True)
    assert info.executions >= 6


def test_contexts_are_apart_and_one_that_ends_ends_alone(
    agent: Agent, host: HostClient, contexts: str
) -> None:
    run(host, contexts, "x = 1")
    request = CreateContext("ctx_other", cwd="/usr")
    made = host.create_context(contexts, request)
    assert host.create_context(contexts, request) == made
    assert run(host, contexts, "import os; os.getcwd()", "ctx_other").value == "'/usr'"
    failed = run(host, contexts, "x", "ctx_other")
    assert failed.error is not None
    assert failed.error.name == "NameError"
    started = "import subprocess; subprocess.Popen(['sleep', '1000'], start_new_session=True)"
    run(host, contexts, f"y = 2; {started}", "ctx_other")
    before = group_of(agent, contexts, "ctx_other")
    host.restart_context(contexts, "ctx_other")
    assert not set(before) & set(group_of(agent, contexts, "ctx_other"))
    assert run(host, contexts, "'y' in globals()", "ctx_other").value == "False"
    assert run(host, contexts, "x").value == "1"
    host.remove_context(contexts, "ctx_other")
    assert group_of(agent, contexts, "ctx_other") == []
    assert run(host, contexts, "x").value == "1"
    for call in (host.remove_context, host.restart_context):
        with pytest.raises(ContextNotFound):
            call(contexts, "ctx_other")
    with pytest.raises(ContextNotFound):
        run(host, contexts, "1", "ctx_other")
    with pytest.raises(ContextNotFound):
        run(host, contexts, "1", "../x")
    with pytest.raises(CwdNotFound):
        host.create_context(contexts, CreateContext("ctx_lost", cwd="/nope"))
    with pytest.raises(InterpreterUnavailable, match="julia"):
        run(host, contexts, "1", language="julia")
    assert [each.id for each in host.contexts(contexts)] == ["default"]


def test_what_runs_too_long_is_interrupted_and_what_is_deaf_is_replaced(
    host: HostClient, contexts: str
) -> None:
    late = run(host, contexts, "x = 7\nimport time; time.sleep(1000)", timeout_seconds=0.5)
    assert (late.last.interrupted, late.last.lost) == (True, "")
    assert late.error is not None
    assert late.error.name == "KeyboardInterrupt"
    assert run(host, contexts, "x").value == "7"
    deaf = run(host, contexts, DEAF, timeout_seconds=0.5)
    assert (deaf.last.interrupted, bool(deaf.last.lost)) == (True, True)
    assert deaf.error is not None
    assert deaf.error.name == "ContextLost"
    again = run(host, contexts, "'x' in globals()")
    assert (again.value, again.last.restarted) == ("False", True)
    killed = run(host, contexts, "import os; os.kill(os.getpid(), 9)")
    assert "signal 9" in killed.last.lost


def test_a_client_that_leaves_interrupts_and_others_wait_their_turn(
    host: HostClient, contexts: str
) -> None:
    run(host, contexts, "x = 1")
    with closing(host.code_frames(contexts, RunCode("import time; time.sleep(1000)"))) as frames:
        assert next(frames).kind == "started"
        with pytest.raises(ContextBusy):
            run(host, contexts, "x", timeout_seconds=0.2)
    with ThreadPoolExecutor(3) as threads:
        futures = [threads.submit(run, host, contexts, "x += 1; x") for _ in range(3)]
    assert sorted(each.result().value or "" for each in futures) == ["2", "3", "4"]


def test_floods_bombs_and_liars_are_only_their_owners_trouble(
    agent: Agent, host: HostClient, contexts: str
) -> None:
    flood = run(
        host, contexts, "print('x' * 20_000_000)\ndisplay({'text/plain': 'y' * 10**6}, raw=True)"
    )
    assert len(flood.printed["stdout"]) == 0 or len(flood.printed["stdout"]) <= 2 * MEBIBYTE
    assert set(flood.last.truncated) == {"stdout", "result.text"}
    big = run(host, contexts, "raise ValueError('z' * 40_000_000)")
    assert big.error is not None
    assert big.last.truncated == ("error",)
    host.create_context(contexts, CreateContext("ctx_bomb"))
    run(host, contexts, BOMB, "ctx_bomb", timeout_seconds=1.0)
    host.restart_context(contexts, "ctx_bomb")
    assert run(host, contexts, "1 + 1", "ctx_bomb").value == "2"
    # Whoever takes the bridge's place says what they like.
    liar = (
        "import os, socket, glob\n"
        "bridge = os.getppid()\n"
        "fds = [os.pidfd_open(bridge)]\n"
        "import ctypes\n"
        "for n in range(3, 40):\n"
        "    fd = ctypes.CDLL(None, use_errno=True).syscall(438, fds[0], n, 0)\n"
        "    if fd >= 0:\n"
        "        try: s = socket.socket(fileno=fd); s.getpeername()\n"
        "        except OSError: continue\n"
        '        s.setblocking(True); s.sendall(b\'{"kind": "done", "duration_ms": -1}\\n\')\n'
    )
    lied = run(host, contexts, liar, "ctx_bomb", timeout_seconds=20)
    assert "protocol" in lied.last.lost or lied.last.lost == ""
    assert run(host, contexts, "1 + 1").value == "2"


def test_kernels_outlive_the_agent_and_freeze_with_their_sandbox(
    agent: Agent, host: HostClient, contexts: str
) -> None:
    run(host, contexts, "x = 5")
    agent.kill()
    agent.start()
    assert [each.alive for each in host.contexts(contexts)] == [True]
    assert run(host, contexts, "x").value == "5"
    host.pause_sandbox(contexts, far())
    with pytest.raises(ContainerPaused):
        run(host, contexts, "x")
    assert len(host.contexts(contexts)) == 1
    host.resume_sandbox(contexts, far())
    assert run(host, contexts, "x").value == "5"


def js(host: HostClient, sandbox_id: str, code: str, **more: Any) -> Ran:
    return run(host, sandbox_id, code, language="javascript", **more)


def test_javascript_runs_in_node_and_keeps_what_was_declared(
    host: HostClient, contexts: str
) -> None:
    first = js(
        host, contexts, "const x = 40; let {y, ...z} = {y: 2, z: 3}\nconsole.log('größe', z)"
    )
    assert first.first.context_id == "default-javascript"
    assert (first.error, first.printed["stdout"]) == (None, "größe { z: 3 }\n")
    # What was declared may be declared again, with an await or without.
    assert (
        js(host, contexts, "const x = await new Promise(r => setTimeout(r, 5, 1)); x + y").value
        == "3"
    )
    again = js(host, contexts, "const x = 5; class A {}; function f() { return x }\n[f(), new A()]")
    assert again.value == "[ 5, A {} ]"
    both = "console.error('e'); require('child_process').execSync('echo sub', {stdio: 'inherit'})"
    assert js(host, contexts, f"{both}; 0").printed == {"stdout": "sub\n", "stderr": "e\n"}
    imported = "import fs, {existsSync as there} from 'fs'\nthere('/') && (await import('os')).EOL"
    assert js(host, contexts, imported).value == "'\\n'"
    # Without semicolons, and with parentheses around what it gives back.
    bare = "let a = [x]\nconst {length: b} = await a\nimport {sep} from 'path'\n(await [a, b, sep])"
    assert js(host, contexts, bare).value == "[ [ 5 ], 1, '/' ]"
    module = "/workspace/node_modules/p/index.js"
    host.exec(contexts, Exec(f"mkdir -p $(dirname {module}); echo 'exports.p = 1' >{module}"))
    called = js(host, contexts, "async function main() { console.log(require('p')) }\nmain()")
    assert called.printed["stdout"] == "{ p: 1 }\n"
    png, html, bundle = js(host, contexts, SHOWN).results
    assert (png.png, html.html, bundle.json) == ("iVBORwE=", "<b>x</b>", {"a": 1})


def test_what_goes_wrong_in_javascript_leaves_the_variables(
    host: HostClient, contexts: str
) -> None:
    failed = js(host, contexts, "x = 5; function f() {\n  throw new TypeError('bad')\n}\nf()").error
    assert failed is not None
    assert (failed.name, failed.value) == ("TypeError", "bad")
    assert "  throw new TypeError('bad')" in failed.traceback
    assert "/workspace/run-1.js:2:9" in "".join(failed.traceback)
    assert not any("runner.cjs" in line or "node:" in line for line in failed.traceback)
    wrong = js(host, contexts, "let 5 = 5").error
    assert wrong is not None
    assert wrong.name == "SyntaxError"
    for code in ("while (true) {}", "await new Promise(() => {})", SLEEPING):
        late = js(host, contexts, code, timeout_seconds=0.5)
        assert (late.last.interrupted, late.last.lost) == (True, ""), code
        assert late.error is not None
        assert late.error.name == "Interrupted"
    assert js(host, contexts, "x").value == "5"
    flood = "for (let n = 0; n < 3000; n++) console.log('x'.repeat(1000)); 'y'.repeat(1e6)"
    flooded = js(host, contexts, flood)
    assert len(flooded.printed["stdout"]) <= 2 * MEBIBYTE
    assert set(flooded.last.truncated) == {"stdout", "result.text"}
    ended = js(host, contexts, "process.exit(3)")
    assert "status 3" in ended.last.lost
    again = js(host, contexts, "typeof x")
    assert (again.value, again.last.restarted) == ("'undefined'", True)


def test_there_are_only_so_many_and_none_where_there_is_no_python(
    host: HostClient, contexts: str, sandbox: SandboxInfo
) -> None:
    run(host, contexts, "x = 1")
    host.exec(contexts, Exec("mv $(command -v python3) /root/python3"))
    with pytest.raises(InterpreterUnavailable, match="python3"):
        host.restart_context(contexts, "default")
    assert [(each.id, each.alive) for each in host.contexts(contexts)] == [("default", False)]
    host.exec(contexts, Exec("mv /root/python3 /usr/local/bin/python3"))
    assert run(host, contexts, "'x' in globals()").last.restarted
    for number in range(MAX_CONTEXTS - len(host.contexts(contexts))):
        host.create_context(contexts, CreateContext(f"ctx_{number}"))
    with pytest.raises(TooManyContexts):
        host.create_context(contexts, CreateContext("ctx_more"))
    with pytest.raises(InterpreterUnavailable):
        run(host, sandbox.id, "1")
    assert host.contexts(sandbox.id) == []
    assert host.exec(sandbox.id, Exec("echo fine")).stdout == b"fine\n"


# Kernels that wait -------------------------------------------------------------------------------

RANDOM = (
    "import os, random, secrets, uuid, numpy\n"
    "random.random(), numpy.random.random(), uuid.uuid4(), secrets.token_hex(8), os.urandom(8)"
)
ABOUT = "import os; [os.getcwd(), os.environ['OWN'], os.environ['HOME'], 'os' in dir()]"


CONFINED = r"""
import os, re
text = "".join(open(f"/proc/self/{name}").read() for name in (
    "limits", "cgroup", "uid_map", "oom_score_adj", "mounts", "status"))
kept = re.findall(r"(?m)^(?!Vm|Rss|Pid|Tgid|PPid|Ngid|NS|Threads|Sig|\w*voluntary).*", text)
[os.nice(0), os.getpriority(os.PRIO_PROCESS, 0), kept]
"""


def test_a_kernel_that_waited_comes_with_the_container(
    agent: Agent, host: HostClient, image: str
) -> None:
    sandboxes: list[str] = []
    before: dict[str, int] = {}

    def create(**env: str) -> str:
        sandboxes.append(f"sbx_waited{os.getpid()}-{len(sandboxes)}")
        options: dict[str, Any] = {"cpu": 1.0, "memory_mb": 512, "network": "open"}
        return host.create_sandbox(CreateSandbox(sandboxes[-1], image, env=env, **options)).id

    def from_kernel(**env: str) -> tuple[str, list[int]]:
        """A sandbox with a kernel that has waited for it, and its processes."""
        while True:
            used = wait_for_kernel(agent)
            sandbox = create(**env)
            if (name := container_of(agent.state, sandbox)) in used:
                before[sandbox] = used[name]
                return sandbox, group_of(agent, sandbox, "default")
            run(host, sandbox, "1")

    try:
        with keeping_warm(agent, 2):
            assert run(host, create(OWN="first"), "1").value == "1"
            first, processes = from_kernel(OWN="mine")
            assert host.contexts(first) == []
            ran = run(host, first, RANDOM)
            assert group_of(agent, first, "default") == processes
            assert (ran.last.execution_count, ran.last.restarted) == (1, False)
            about = run(host, first, ABOUT).value
            assert about == "['/workspace', 'mine', '/root', True]"
            confined = run(host, first, CONFINED).value
            host.restart_context(first, "default")
            assert run(host, first, CONFINED).value == confined
            for _ in eventually():
                if links_of(agent, first) == ["up"]:
                    break
            meter = {each.id: each.total for each in host.usage()}[first]
            used = cgroup_layout().container(container_of(agent.state, first)).cpu_us()
            assert meter.cpu_seconds <= (used - before[first]) / 1e6, "it was nobody's before"
            assert host.exec(first, Exec("cat /proc/net/route")).stdout.count(b"eth0") == 2
            other, _ = from_kernel(OWN="other")
            again = run(host, other, RANDOM)
            assert not set(values(ran)) & set(values(again))
            # What only takes effect at the start is there, too: nobody gets what lacks it.
            path, processes = from_kernel(OWN="path", PYTHONPATH="/opt")
            found = run(host, path, "import sys; '/opt' in sys.path")
            assert (found.value, found.last.restarted) == ("True", False)
            assert not set(group_of(agent, path, "default")) & set(processes)
            # One that has died is replaced, and nobody hears of it.
            dead, processes = from_kernel()
            os.kill(max(processes), signal.SIGKILL)
            assert run(host, dead, "1").last.restarted is False
            unused, processes = from_kernel()
        # Whatever the next agent finds of one that nobody has used is removed.
        for _ in eventually():
            if not [pid for pid in processes if Path(f"/proc/{pid}").exists()]:
                break
        assert run(host, unused, "1").last.execution_count == 1
        assert list((agent.state / "warm").iterdir()) == []
    finally:
        for each in sandboxes:
            host.delete_sandbox(each)


def values(ran: Ran) -> list[str]:
    return (ran.value or "").strip("()").split(", ")


def wait_for_kernel(agent: Agent) -> dict[str, int]:
    """Wait until warm containers have a kernel, frozen and without a network.

    What each has used of processors so far, in microseconds.
    """
    found: dict[str, int] = {}
    for _ in eventually():
        for name in waiting(agent):
            owner = name.removeprefix(agent.prefix)
            if not (agent.state / "warm" / owner / "kernel" / "kernel.json").exists():
                continue
            assert links_of(agent, owner) == ["down"]
            assert pids_under(cgroup_layout().container(name).background_group("code-default"))
            found[name] = cgroup_layout().container(name).cpu_us()
        if found:
            break
    return found


def links_of(agent: Agent, owner: str) -> list[str]:
    """The state of the interface of an owner's slot, where the host sees it."""
    run_dir = RUN_ROOT / agent.prefix.removeprefix("ork").removesuffix("-")
    records = [json.loads(path.read_text()) for path in (run_dir / "slots").iterdir()]
    names = [f"{agent.prefix}o{each['index']}" for each in records if each["owner"] == owner]
    return [Path(f"/sys/class/net/{name}/operstate").read_text().strip() for name in names]

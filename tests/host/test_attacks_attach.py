"""Attacks on the host's own hand: the processes that it puts into a container."""

from __future__ import annotations

import hashlib
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from hostruntime.errors import HostError
from hostruntime.wire.commands import Exec
from hostruntime.wire.files import FileContent
from hostruntime.wire.sandboxes import CreateSandbox, SandboxInfo
from tests.host.agent import Agent, eventually
from tests.host.attackers import HELPER, PLACE
from tests.host.attacks.spy import ATTEMPTS
from tests.host.client import HostClient
from tests.host.conftest import NewSandbox

pytestmark = [pytest.mark.host, pytest.mark.pythons]

_ENVIRONMENT = {"PYTHONPATH": PLACE, "PYTHONDONTWRITEBYTECODE": "1"}


@pytest.fixture
def hostile(new_sandbox: NewSandbox, attackers: str) -> SandboxInfo:
    return new_sandbox(image=attackers, cpu=2.0, network="off")


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def interpreter() -> Path:
    """The program the launchers run."""
    return Path(sys.executable).resolve()


# What is seen of an attached process ------------------------------------------------------------


@pytest.fixture(scope="module")
def spied(agent: Agent, attackers: str) -> dict[str, Any]:
    """What a spy inside got hold of while the host ran commands and moved files."""
    host, before = agent.client, digest(interpreter())
    host.create_sandbox(
        CreateSandbox("sbx_spied", image=attackers, cpu=2.0, memory_mb=512, network="off")
    )
    try:
        argv = ["python3", "-m", "tests.host.attacks.spy", "4"]
        with ThreadPoolExecutor(3) as pool:
            spying = pool.submit(host.exec, "sbx_spied", Exec(argv, env=_ENVIRONMENT))
            content = bytes(3_000_000)
            while not spying.done():
                list(pool.map(lambda _: host.exec("sbx_spied", Exec(["/bin/true"])), range(4)))
                host.write_file("sbx_spied", "/workspace/big", content)
                host.read_path("sbx_spied", "/workspace/big")
            result = spying.result()
    finally:
        host.delete_sandbox("sbx_spied")
    assert result.code == 0, result.stderr.decode()[-2000:]
    assert digest(interpreter()) == before
    return dict(json.loads(result.stdout))


@pytest.mark.parametrize("attempt", ATTEMPTS)
def test_nobody_inside_gets_hold_of_an_attached_process(
    spied: dict[str, Any], attempt: str
) -> None:
    # A program that runs is not to be written by anybody (ETXTBSY in open(2)).
    assert attempt in spied["own"] or attempt == "overwrite its program", "it works at all"
    assert spied["seen"] >= 5, "the spy saw too little to tell"
    assert spied["refused"].get(attempt, 0) >= 3, spied
    assert spied["succeeded"] == {}


def test_an_attached_process_shows_no_path_of_the_host(agent: Agent) -> None:
    """What the spy knows them by is all that there is to be read of the launchers' words."""
    lines = [Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0") for pid in agent.children()]
    assert lines.count(b"orkestr hostruntime.container.lxc") == 2


# Programs put in the way --------------------------------------------------------------------------


def preloaded(host: HostClient, sandbox: SandboxInfo) -> list[list[str]]:
    """Pid, program and errno of every process that the planted library was loaded into."""
    found = host.read_path(sandbox.id, "/workspace/preloaded")
    assert isinstance(found, FileContent)
    return [line.split() for line in found.content.decode().splitlines()]


def test_a_library_planted_for_every_program_is_not_loaded_by_the_host(
    host: HostClient, hostile: SandboxInfo
) -> None:
    before = digest(interpreter())
    host.write_file(hostile.id, "/etc/ld.so.preload", f"/{HELPER}\n".encode())
    for _ in range(5):
        assert host.exec(hostile.id, Exec(["/bin/true"])).code == 0
        host.write_file(hostile.id, "/workspace/a", b"a")
    seen = preloaded(host, hostile)
    assert {program for _, program, _ in seen} == {"/usr/bin/true"}
    assert len(seen) == 5
    assert digest(interpreter()) == before


def test_a_library_named_in_a_commands_environment_stays_with_the_command(
    host: HostClient, hostile: SandboxInfo
) -> None:
    host.exec(
        hostile.id, Exec(["/bin/true"], env={"LD_PRELOAD": f"/{HELPER}", "PYTHONINSPECT": "1"})
    )
    assert [program for _, program, _ in preloaded(host, hostile)] == ["/usr/bin/true"]


def test_the_hosts_program_run_by_its_magic_link_cannot_be_written(
    host: HostClient, hostile: SandboxInfo
) -> None:
    """CVE-2019-5736: have the attaching process execute itself, then overwrite what it is."""
    before, host_program = digest(interpreter()), interpreter()
    host.write_file(hostile.id, "/etc/ld.so.preload", f"/{HELPER}\n".encode())
    for shell in ("/usr/bin/bash", "/usr/bin/dash"):
        host.delete_path(hostile.id, shell)
        host.write_file(hostile.id, shell, b"#!/proc/self/exe\n", mode=0o755)
    # A library of this name is what the interpreter of some installations looks for.
    for name in (f"libpython3.{sys.version_info.minor}.so.1.0", "libpython3.so"):
        library = host.read_path(hostile.id, f"/{HELPER}")
        assert isinstance(library, FileContent)
        host.write_file(hostile.id, f"/usr/lib/{name}", library.content)
    host.exec(hostile.id, Exec("echo in the shell"))
    seen = [words for words in preloaded(host, hostile) if "python" in words[1]]
    assert seen, "the interpreter of the host was run inside"
    assert {refused for _, _, refused in seen} <= {"13", "26", "30"}, "EACCES, ETXTBSY, EROFS"
    assert digest(host_program) == before


def test_a_replaced_shell_runs_inside_and_nowhere_else(
    host: HostClient, hostile: SandboxInfo, tmp_path: Path
) -> None:
    script = (
        "#!/usr/bin/env python3\nimport os\nprint(os.getuid(), open('/proc/self/uid_map').read())"
    )
    for shell in ("/usr/bin/bash", "/usr/bin/dash"):
        host.delete_path(hostile.id, shell)
        host.write_file(hostile.id, shell, script.encode(), mode=0o755)
    words = host.exec(hostile.id, Exec(f"touch {tmp_path}/here")).stdout.split()
    assert words[0] == b"0"
    assert int(words[2]) >= 1_000_000_000, "the replacement ran, in the container's namespace"
    assert list(tmp_path.iterdir()) == []


# What a command starts with -----------------------------------------------------------------------


def test_a_command_has_three_descriptors_all_pipes_or_null_and_no_terminal(
    host: HostClient, hostile: SandboxInfo
) -> None:
    script = (
        "import os, json\n"
        "fds = {n: os.readlink('/proc/self/fd/' + n) for n in os.listdir('/proc/self/fd')\n"
        "       if os.path.lexists('/proc/self/fd/' + n)}\n"
        "try: os.open('/dev/tty', os.O_RDWR)\n"
        "except OSError as error: fds['tty'] = error.strerror\n"
        "print(json.dumps(fds))"
    )
    found = json.loads(host.exec(hostile.id, Exec(["python3", "-c", script])).stdout)
    assert found.pop("tty") == "No such device or address"
    assert found.pop("0") == "/dev/null"
    assert found.pop("1").startswith("pipe:")
    assert found.pop("2").startswith("pipe:")
    assert found == {}


def test_a_commands_environment_is_what_it_was_given_and_nothing_of_the_hosts(
    host: HostClient, hostile: SandboxInfo
) -> None:
    out = host.exec(hostile.id, Exec(["env", "-0"], env={"A": "1"})).stdout.decode()
    names = {line.partition("=")[0] for line in out.split("\0") if line}
    assert {"A", "PATH", "HOME"} <= names
    allowed = {"A", "PATH", "HOME", "LANG", "DEBIAN_FRONTEND", "NPM_CONFIG_GLOBALCONFIG"}
    rest = {name for name in names - allowed if not name.startswith("PIP_")}
    assert rest <= {
        *("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "NODE_EXTRA_CA_CERTS"),
        *("GIT_SSL_CAINFO", "YARN_ENABLE_TELEMETRY", "UV_OFFLINE", "COREPACK_ENABLE_NETWORK"),
        *("CARGO_NET_OFFLINE", "CONDA_OFFLINE", "HF_HUB_OFFLINE"),
        *("DENO_NO_UPDATE_CHECK", "NEXT_TELEMETRY_DISABLED"),
        # The size of the sandbox, not that of the host.
        *("OMP_NUM_THREADS", "GOMAXPROCS", "PYTHON_CPU_COUNT"),
    }


@pytest.mark.parametrize(
    "word",
    [
        "$(touch {})",
        "`touch {}`",
        "; touch {}",
        "' ; touch {} ; '",
        "\n touch {}\n",
        "| touch {}",
        "--version\ntouch {}",
        "{}/../\\x00",
    ],
)
def test_words_names_and_values_are_never_pasted_into_a_shell(
    host: HostClient, hostile: SandboxInfo, tmp_path: Path, word: str
) -> None:
    text = word.format(tmp_path / "owned")
    echo = ["python3", "-c", "import sys, os; print(repr((sys.argv[1], os.environ['X'])))", text]
    assert host.exec(hostile.id, Exec(echo, env={"X": text})).stdout.decode().strip() == repr(
        (text, text)
    )
    name = f"/workspace/{text.replace('/', '_')}"
    host.write_file(hostile.id, name, b"kept")
    found = host.read_path(hostile.id, name)
    assert isinstance(found, FileContent)
    assert found.content == b"kept"
    with pytest.raises(HostError):
        host.exec(hostile.id, Exec(["true"], cwd=f"/{text}"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("argv", [["echo", "a\0b"], ["a\0", "b"]])
def test_a_nul_in_a_word_is_refused(
    host: HostClient, hostile: SandboxInfo, argv: list[str]
) -> None:
    with pytest.raises(HostError):
        host.exec(hostile.id, Exec(argv))
    assert host.exec(hostile.id, Exec(["echo", "on"])).stdout == b"on\n"


@pytest.mark.parametrize(
    "cwd",
    ["/proc/self/fd/3", "/proc/self/fd/4", "/proc/self/fd/1", "/proc/self/exe", "/dev/fd/3"],
)
def test_a_descriptor_of_the_attaching_process_is_no_working_directory(
    host: HostClient, hostile: SandboxInfo, cwd: str
) -> None:
    host.exec(hostile.id, Exec(["ln", "-s", cwd, "/root/way"]))
    for path in (cwd, "/root/way"):
        with pytest.raises(HostError):
            host.exec(hostile.id, Exec(["pwd"], cwd=path))


@pytest.mark.parametrize("target", ["/", "/proc/1/root", "/proc/self/root", "/proc/1/cwd"])
def test_a_link_for_a_working_directory_leads_to_the_containers_own(
    agent: Agent, host: HostClient, hostile: SandboxInfo, target: str
) -> None:
    host.exec(hostile.id, Exec(["ln", "-s", target, "/workspace/way"]))
    result = host.exec(hostile.id, Exec(["ls", "-a", "."], cwd="/workspace/way"))
    assert b".orkestr" in result.stdout
    above = f"/workspace/way/{'../' * 30}{str(agent.state).lstrip('/')}"
    with pytest.raises(HostError):
        host.exec(hostile.id, Exec(["pwd"], cwd=above))


def test_a_container_that_fights_its_attachers_is_ended_all_the_same(
    host: HostClient, hostile: SandboxInfo
) -> None:
    """Kill every new process at sight: the host notices, reports, and can still end it."""
    script = (
        "import os, signal, time\n"
        "end = time.monotonic() + 2\n"
        "killed = 0\n"
        "while time.monotonic() < end:\n"
        "    for name in os.listdir('/proc'):\n"
        "        if name.isdigit() and int(name) not in (1, os.getpid()):\n"
        "            try:\n"
        "                os.kill(int(name), signal.SIGKILL)\n"
        "                killed += 1\n"
        "            except OSError: pass\n"
        "print(killed)"
    )
    with ThreadPoolExecutor(1) as pool:
        fighting = pool.submit(host.exec, hostile.id, Exec(["python3", "-c", script]))
        codes = []
        while not fighting.done():
            codes.append(host.exec(hostile.id, Exec(["sleep", "0.2"])).code)
        assert int(fighting.result().stdout) > 0
    assert set(codes[:-1]) <= {0, 137, 126, 127}
    assert 137 in codes
    for _ in eventually():
        if host.exec(hostile.id, Exec(["echo", "on"])).stdout == b"on\n":
            break

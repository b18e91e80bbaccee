"""Real containers in the namespaces' world: what their own root can and cannot do to a network."""

from __future__ import annotations

import asyncio
import json
import textwrap
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from hostruntime.container import delegation
from hostruntime.container.apparmor import profile_name
from hostruntime.container.cgroups import cgroup_layout
from hostruntime.container.exec import Chunk, Exited
from hostruntime.container.launcher import LauncherPool
from hostruntime.container.limits import Limits
from hostruntime.container.manager import ContainerManager, ContainerSpec
from hostruntime.container.runtime_layer import build_runtime_layers
from hostruntime.host.paths import StatePaths, claim_instance, release_instance
from hostruntime.host.rundir import RunDir
from hostruntime.network.egress import EgressProxy
from hostruntime.network.policy import Policy, deny_list
from hostruntime.network.settings import NetworkSettings
from hostruntime.network.slots import SlotPool
from tests.host.smalltree import PYTHON, make_small_tree
from tests.host.topology import GREETING, HOST, INTERNET, METADATA, PRIVATE, RESOLVER, a_world

pytestmark = pytest.mark.host

SETTINGS = NetworkSettings(denied=deny_list(), permitted=(), resolvers=(RESOLVER,))

# Runs inside: each attempt is "ok" with what it returned, or the name of its error.
PRELUDE = f"""
import ctypes, errno, fcntl, json, os, socket, struct, sys, urllib.error, urllib.request
INTERNET, HOST, METADATA, PRIVATE = {INTERNET!r}, {HOST!r}, {METADATA!r}, {PRIVATE[0]!r}
said = {{}}
def attempt(name, action):
    try:
        said[name] = ["ok", action()]
    except OSError as error:
        said[name] = [errno.errorcode.get(error.errno, type(error).__name__), str(error)]
def hear(address, port):
    with socket.create_connection((address, port), 2) as connection:
        return connection.recv(100).decode()
def write(path, text):
    with open(path, "w") as handle:
        handle.write(text)
"""

ATTACKS = """
def set_address():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as handle:
        ip = struct.pack("HH4s8x", socket.AF_INET, 0, socket.inet_aton("10.9.9.9"))
        fcntl.ioctl(handle, 0x8916, struct.pack("16s16s8x", b"lo", ip))
def enter_the_hosts():
    libc = ctypes.CDLL(None, use_errno=True)
    handle = os.open("/proc/1/ns/net", os.O_RDONLY)
    if libc.setns(handle, 0) != 0:
        raise OSError(ctypes.get_errno(), "setns")
    set_address()
attempt("raw", lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, 1).close())
attempt("packet", lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 3).close())
attempt("address", set_address)
attempt("setns", enter_the_hosts)
attempt("sysctl", lambda: write("/proc/sys/net/ipv4/ip_forward", "1"))
attempt("sysfs", lambda: write("/sys/class/net/lo/mtu", "1280"))
attempt("mark", lambda: socket.socket().setsockopt(socket.SOL_SOCKET, 36, 0x6f726b00))
"""


class Containers:
    """A running host agent's container parts, and a way to run Python in one container."""

    def __init__(self, manager: ContainerManager, proxy: EgressProxy, image: Path) -> None:
        self.manager = manager
        self.proxy = proxy
        self._image = image

    async def start(self, owner: str, policy: Policy) -> None:
        directory = self.manager.paths.sandboxes / owner
        spec = ContainerSpec(owner, self._image, policy, Limits(cpu=1.0, memory_mb=256), directory)
        await self.manager.start(spec)

    async def python(self, owner: str, source: str) -> dict[str, list[Any]]:
        script = PRELUDE + textwrap.dedent(source) + "\nprint(json.dumps(said))\n"
        out, err, code = b"", b"", None
        frames = self.manager.exec(owner, [PYTHON, "-c", script], cwd="/root", env={}, timeout=30)
        async with aclosing(frames):
            async for frame in frames:
                if isinstance(frame, Chunk):
                    out, err = (
                        (out + frame.data, err)
                        if frame.stream == "stdout"
                        else (out, err + frame.data)
                    )
                elif isinstance(frame, Exited):
                    code = frame.code
        assert code == 0, err.decode()
        answers: dict[str, list[Any]] = json.loads(out)
        return answers


@asynccontextmanager
async def containers(root: Path) -> AsyncIterator[Containers]:
    paths = StatePaths(root / "state").ensure()
    async with AsyncExitStack() as stack:
        instance = claim_instance(paths)
        stack.callback(release_instance, paths)
        stack.callback(delegation.tear_down, instance)
        delegation.set_up(instance)
        stack.callback(cgroup_layout().remove_instance, instance.prefix)
        pool = SlotPool(paths, instance, SETTINGS)
        stack.callback(pool.teardown)
        pool.setup()
        pool.reclaim(set())
        proxy = EgressProxy(paths, instance, pool)
        stack.callback(proxy.stop)
        proxy.start()
        build_runtime_layers(paths, pool)
        launchers = LauncherPool(
            RunDir.of(instance).lxc, root / "launcher.log", apparmor=profile_name(instance)
        )
        stack.push_async_callback(launchers.close)
        await launchers.open()
        manager = ContainerManager(paths, instance, pool, launchers)
        stack.push_async_callback(manager.close)
        try:
            yield Containers(manager, proxy, root / "image")
        finally:
            for owner in manager.running():
                await manager.stop(owner)


Scenario = Callable[[Containers], Coroutine[Any, Any, None]]


@pytest.fixture(scope="module")
def act(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[Scenario], None]]:
    """Play scenarios on one set of containers, in a world where `allowed.test` exists."""
    root = tmp_path_factory.mktemp("containers")
    make_small_tree(root / "image")
    with a_world(root) as world, asyncio.Runner() as runner:
        world.names |= {"allowed.test": [INTERNET], "elsewhere.test": [INTERNET]}
        life = containers(root)
        parts = runner.run(life.__aenter__())
        try:
            yield lambda scenario: runner.run(scenario(parts))
        finally:
            runner.run(life.__aexit__(None, None, None))


def words(answers: dict[str, list[Any]]) -> dict[str, str]:
    return {name: answer[0] for name, answer in answers.items()}


@pytest.mark.parametrize("mode", ["off", "restricted", "open"])
def test_container_root_has_no_power_over_its_network(
    act: Callable[[Scenario], None], mode: str
) -> None:
    async def scenario(parts: Containers) -> None:
        await parts.start(f"attack.{mode}", Policy.parse(mode))
        answers = words(await parts.python(f"attack.{mode}", ATTACKS))
        assert answers.pop("sysctl") in {"EROFS", "EACCES", "EPERM"}
        assert answers.pop("sysfs") in {"EROFS", "EACCES", "EPERM"}
        assert set(answers) == {"raw", "packet", "address", "setns", "mark"}
        # The families nobody needs are not there at all.
        assert answers.pop("packet") == "EAFNOSUPPORT"
        assert set(answers.values()) == {"EPERM"}

    act(scenario)


def test_off_sees_loopback_alone_and_may_use_it(act: Callable[[Scenario], None]) -> None:
    async def scenario(parts: Containers) -> None:
        await parts.start("box.off", Policy("off"))
        answers = await parts.python(
            "box.off",
            """
            attempt("interfaces", lambda: sorted(os.listdir("/sys/class/net")))
            attempt("outside", lambda: hear(INTERNET, 443))
            attempt("name", lambda: socket.gethostbyname("allowed.test"))
            attempt("port", lambda: socket.create_server(("0.0.0.0", 80)).close())
            attempt("localhost", lambda: socket.gethostbyname("localhost"))
            attempt("ping", lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM, 1).close())
            """,
        )
        assert answers["interfaces"] == ["ok", ["lo"]]
        assert answers["localhost"] == ["ok", "127.0.0.1"]
        assert answers["port"][0] == answers["ping"][0] == "ok"
        assert answers["outside"][0] == "ECONNREFUSED"
        assert answers["name"][0] != "ok"

    act(scenario)


def test_restricted_gets_out_by_name_alone(act: Callable[[Scenario], None]) -> None:
    async def scenario(parts: Containers) -> None:
        await parts.start("box.restricted", Policy("restricted", ("allowed.test",)))
        answers = await parts.python(
            "box.restricted",
            """
            host, port = os.environ["https_proxy"].removeprefix("http://").split(":")
            def tunnel(name):
                with socket.create_connection((host, int(port)), 5) as connection:
                    connection.sendall(f"CONNECT {name}:443 HTTP/1.1\\r\\n\\r\\n".encode())
                    stream = connection.makefile("rb")
                    status = int(stream.readline().split()[1])
                    while stream.readline().strip():
                        pass
                    # What follows 200 is TLS, which the table of egress speaks.
                    return status, "" if status == 200 else stream.readline().decode()
            def plain():
                try:
                    return urllib.request.urlopen("http://allowed.test/", timeout=5).status
                except urllib.error.HTTPError as error:
                    return error.code, error.read().decode()
            attempt("listed", lambda: tunnel("allowed.test"))
            attempt("unlisted", lambda: tunnel("elsewhere.test"))
            attempt("plain", plain)
            attempt("direct", lambda: hear(INTERNET, 443))
            attempt("metadata", lambda: hear(METADATA, 80))
            attempt("host", lambda: hear(HOST, 22))
            attempt("name", lambda: socket.gethostbyname("allowed.test"))
            """,
        )
        assert answers["listed"] == ["ok", [200, ""]]
        assert answers["unlisted"][1][0] == answers["plain"][1][0] == 403
        assert "only HTTPS is allowed" in answers["plain"][1][1]
        direct = {answers[name][0] for name in ("direct", "metadata", "host")}
        assert direct == {"ECONNREFUSED"}
        assert answers["name"][0] != "ok"
        decisions = parts.proxy.decisions("box.restricted")
        assert [(d.host, d.verdict) for d in decisions if not d.direct] == [
            ("allowed.test", "allowed"),
            ("elsewhere.test", "refused"),
            ("allowed.test", "refused"),
        ]
        assert {(d.method, d.host, d.verdict) for d in decisions if d.direct} == {
            ("TCP", INTERNET, "refused"),
            ("TCP", METADATA, "refused"),
            ("TCP", HOST, "refused"),
            ("DNS", "allowed.test", "unreached"),
        }

    act(scenario)


def test_open_resolves_and_reaches_the_outside_but_nothing_private(
    act: Callable[[Scenario], None],
) -> None:
    async def scenario(parts: Containers) -> None:
        await parts.start("box.open", Policy("open"))
        await parts.start("box.neighbour", Policy("open"))
        neighbour = parts.manager.get("box.neighbour").slot.address
        answers = await parts.python(
            "box.open",
            f"""
            attempt("name", lambda: socket.gethostbyname("allowed.test"))
            attempt("outside", lambda: hear("allowed.test", 80))
            for name, address in (("host", HOST), ("metadata", METADATA), ("private", PRIVATE)):
                attempt(name, lambda: hear(address, 80))
            attempt("neighbour", lambda: hear({neighbour!r}, 80))
            """,
        )
        assert answers["name"] == ["ok", INTERNET]
        assert answers["outside"] == ["ok", GREETING.decode()]
        kept = {answers[name][0] for name in ("host", "metadata", "private", "neighbour")}
        assert kept == {"EHOSTUNREACH"}

    act(scenario)


def test_the_layer_is_in_sight_and_never_in_the_writable_layer(
    act: Callable[[Scenario], None],
) -> None:
    async def scenario(parts: Containers) -> None:
        await parts.start("box.layer", Policy("restricted"))
        answers = await parts.python(
            "box.layer",
            """
            def text(path):
                with open(path) as handle:
                    return handle.read()
            attempt("hosts", lambda: text("/etc/hosts"))
            attempt("apt", lambda: text("/etc/apt/apt.conf.d/80orkestr"))
            attempt("owner", lambda: [os.stat("/etc").st_uid, oct(os.stat("/etc").st_mode)])
            attempt("init", lambda: text("/proc/1/comm"))
            """,
        )
        assert "127.0.0.1 localhost" in answers["hosts"][1]
        assert "Acquire::https::Proxy" in answers["apt"][1]
        assert answers["owner"] == ["ok", [0, "0o40755"]]
        upper = parts.manager.layer("box.layer")
        await parts.manager.halt("box.layer")
        captured = sorted(str(path.relative_to(upper)) for path in upper.rglob("*"))
        await parts.manager.stop("box.layer")
        assert not [name for name in captured if name.startswith(("etc", ".orkestr", "workspace"))]

    act(scenario)

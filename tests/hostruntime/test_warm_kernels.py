"""Which warm containers get a kernel, and what becomes of one that its sandbox cannot use."""

from __future__ import annotations

import asyncio
import json
import threading
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import aclosing, asynccontextmanager, closing, contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest

from hostruntime.errors import InvalidRequest, KernelFailed
from hostruntime.host.paths import StatePaths
from hostruntime.image.trash import Trash
from hostruntime.sandbox import warm_pool
from hostruntime.sandbox.bridges import listen
from hostruntime.sandbox.interpreter import Access, Interpreter, Record, _write_record
from hostruntime.sandbox.warm_kernels import (
    SETTING,
    CodeDemand,
    Taken,
    configured_maximum,
    needs_start,
    take,
)
from hostruntime.sandbox.warm_pool import PREFIX, WarmPool
from hostruntime.wire.interpreter import CodeFrame, RunCode
from tests.hostruntime.test_warm_pool import Containers, containers, spec, until

__all__ = ["containers"]
MEBIBYTE = 1024 * 1024


class Starter:
    """Counts the kernels; while ``held``, none becomes ready."""

    def __init__(self) -> None:
        self.maximum = 256
        self.bytes = 1024 * MEBIBYTE
        self.started: list[str] = []
        self.environments: list[Mapping[str, str]] = []
        self.going = asyncio.Event()
        self.going.set()
        self.failure: Exception | None = None
        self.takes = 100 * MEBIBYTE

    def budget(self) -> int:
        return self.bytes

    async def start(self, owner: str, directory: Path, environment: Mapping[str, str]) -> Taken:
        assert directory.name == owner
        self.started.append(owner)
        self.environments.append(environment)
        await self.going.wait()
        if self.failure is not None:
            raise self.failure
        return Taken(self.takes, 1_500_000)


@pytest.fixture
def starter() -> Starter:
    return Starter()


@pytest.fixture
def pool(tmp_path: Path, containers: Containers, starter: Starter) -> WarmPool:
    paths = StatePaths(tmp_path / "state").ensure()
    pool = WarmPool(paths, containers, Trash(paths), maximum=4)  # type: ignore[arg-type]
    pool.kernels = starter
    return pool


async def use(pool: WarmPool, tmp_path: Path, name: str, *, code: bool = True) -> bool:
    """A sandbox that runs code; whether its container waited for it."""
    claimed = await pool.claim(spec(tmp_path, name))
    if code:
        pool.note_code(name, {"BAKED": "1"})
    return claimed is not None


async def test_where_code_is_run_the_next_has_a_kernel(
    tmp_path: Path, pool: WarmPool, starter: Starter
) -> None:
    pool.start()
    await use(pool, tmp_path, "first")
    await until(lambda: pool.count_kernels() == 1)
    assert starter.environments == [{"BAKED": "1"}]
    for number in range(5):
        assert await use(pool, tmp_path, f"next{number}")
        await until(lambda: pool.count_kernels() >= 1)
    await pool.close()
    assert pool.count_kernels() == 0


async def test_where_hardly_any_is_run_none_has_one(
    tmp_path: Path, pool: WarmPool, starter: Starter
) -> None:
    pool.start()
    for number in range(5):
        await use(pool, tmp_path, f"plain{number}", code=False)
    pool.note_code("plain0", {})
    # Of no sandbox that was claimed.
    pool.note_code("other", {})
    await until(lambda: pool.count() == 4)
    assert starter.started == []
    pool.note_code("plain1", {})
    await until(lambda: pool.count_kernels() >= 1)
    await pool.close()


async def test_a_claim_takes_one_that_has_a_kernel(
    tmp_path: Path,
    pool: WarmPool,
    starter: Starter,
    containers: Containers,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    starter.maximum = 1
    taken: list[str] = []
    hand_over = containers.hand_over

    async def noted(owner: str, spec: Any) -> Any:
        taken.append(owner)
        return await hand_over(owner, spec)

    monkeypatch.setattr(containers, "hand_over", noted)
    pool.start()
    for number in range(3):
        await use(pool, tmp_path, f"sbx{number}")
    await until(lambda: pool.count() >= 3 and pool.count_kernels() == 1)
    [mine] = pool._kernels
    taken.clear()
    claimed = await pool.claim(spec(tmp_path, "last"))
    assert taken == [mine]
    # Its sandbox does not pay for what it used before.
    assert claimed is not None
    assert claimed.cpu_us_before == 1_500_000
    await pool.close()


@pytest.mark.parametrize("short_of", ["memory", "number"])
async def test_they_stay_within_their_number_and_memory(
    tmp_path: Path, pool: WarmPool, starter: Starter, short_of: str
) -> None:
    if short_of == "memory":
        starter.bytes = 250 * MEBIBYTE
    else:
        starter.maximum = 2
    pool.start()
    for number in range(4):
        await use(pool, tmp_path, f"sbx{number}")
    await until(lambda: pool.count() == 4 and pool.count_kernels() == 2)
    for _ in range(20):
        await asyncio.sleep(0.01)
        assert pool.count_kernels() <= 2
    await pool.close()


async def test_one_that_takes_too_much_does_not_stay(
    tmp_path: Path, pool: WarmPool, starter: Starter
) -> None:
    starter.takes = 2 * starter.bytes
    pool.start()
    await use(pool, tmp_path, "first")
    await until(lambda: len(starter.started) == 1 and pool.count() == 1)
    for number in range(3):
        assert await use(pool, tmp_path, f"next{number}")
        await until(lambda: pool.count() >= 1)
    assert (len(starter.started), pool.count_kernels()) == (1, 0)
    await pool.close()


async def test_others_do_not_wait_for_a_kernel(
    tmp_path: Path,
    pool: WarmPool,
    starter: Starter,
    containers: Containers,
) -> None:
    pool.start()
    for number in range(3):
        await use(pool, tmp_path, f"sbx{number}")
    starter.going.clear()
    await until(lambda: len(starter.started) >= 1)
    other = spec(tmp_path, "other", 256)
    await pool.claim(other)
    await until(lambda: containers.waiting()[256] == 1)
    for _ in range(20):
        await asyncio.sleep(0.01)
        assert sum(containers.waiting().values()) <= pool.maximum
    # Sandboxes that find no slot have it stopped, too, once nothing else is left.
    pool.maximum = 0
    await until(lambda: pool.count() == 0)
    assert await pool.stop_one()
    assert not [owner for owner in containers.running if owner.startswith(PREFIX)]
    await pool.close()


async def test_one_that_is_stopped_before_it_has_begun_is_stopped(
    tmp_path: Path,
    pool: WarmPool,
    containers: Containers,
) -> None:
    await use(pool, tmp_path, "first")
    await pool._refill(pool._shares())
    pool._start_kernel(pool._demand)
    assert pool.count() == 0
    await pool.close()
    assert containers.waiting() == Counter()


@pytest.mark.parametrize(
    "failure", [KernelFailed("The kernel could not be started."), KeyError("its slot is gone")]
)
async def test_a_failure_costs_one_container_and_is_not_repeated_soon(
    tmp_path: Path,
    pool: WarmPool,
    starter: Starter,
    caplog: pytest.LogCaptureFixture,
    failure: Exception,
) -> None:
    starter.failure = failure
    pool.start()
    await use(pool, tmp_path, "first")
    await until(lambda: len(starter.started) == 1 and pool.count() == 1)
    for number in range(3):
        assert await use(pool, tmp_path, f"next{number}")
        await until(lambda: pool.count() >= 1)
    assert len(starter.started) == 1
    # Only what nobody expected is an error.
    assert ("no kernel could be started" in caplog.text) is isinstance(failure, KeyError)
    await pool.close()


async def test_a_disk_that_removes_nothing_stops_only_that(
    tmp_path: Path, pool: WarmPool, starter: Starter, containers: Containers
) -> None:
    starter.failure = KernelFailed("The kernel could not be started.")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pool.trash, "discard", MagicMock(side_effect=OSError("The disk is broken.")))
        pool.start()
        await use(pool, tmp_path, "first")
        await until(lambda: len(starter.started) == 1)
        # It is replaced, and counted no more.
        await until(lambda: pool.count() == 1 and pool._getting_kernel is None)
        await use(pool, tmp_path, "other", code=False)
        await until(lambda: pool.count() == 2)
        await pool.stop_all()
    assert pool.count() == 0
    await pool.close()
    assert containers.waiting() == Counter()


async def test_what_a_sandbox_does_not_use_is_ended(
    tmp_path: Path, pool: WarmPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[str] = []

    async def end(sandbox: str) -> None:
        ended.append(sandbox)

    pool.end_unused = end
    pool.start()
    await use(pool, tmp_path, "first")
    await until(lambda: pool.count_kernels() == 1)
    await use(pool, tmp_path, "used")
    await until(lambda: pool.count_kernels() >= 1)
    await use(pool, tmp_path, "unused", code=False)
    assert ended == []
    monkeypatch.setattr(warm_pool, "UNUSED_SECONDS", 0.0)
    await until(lambda: ended == ["unused"])
    await pool.close()


def test_what_counts_is_what_the_latest_sandboxes_did() -> None:
    demand = CodeDemand()
    assert not demand.is_worth_it(0.0, 900.0)
    for number in range(16):
        demand.note_claim(f"a{number}")
    demand.note_use("a15", {"x": "1"}, 10.0)
    assert not demand.is_worth_it(10.0, 900.0)
    for number in range(12, 15):
        demand.note_use(f"a{number}", {}, 20.0)
    assert demand.is_worth_it(20.0, 900.0)
    assert not demand.is_worth_it(921.0, 900.0)
    demand.not_before = 30.0
    assert not demand.is_worth_it(20.0, 900.0)
    for number in range(16):
        demand.note_claim(f"b{number}")
    assert not demand.is_worth_it(30.0, 900.0)


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        ({"A": "1"}, False),
        ({"A": "2", "B": "3"}, False),
        ({}, True),
        ({"A": "1", "PYTHONPATH": "/x"}, True),
        ({"A": "1", "LC_ALL": "C"}, True),
        ({"A": "1", "PATH": "/x"}, True),
        ({"A": "1", "TZ": "UTC"}, True),
        ({"A": "1", "MPLBACKEND": "agg", "MY_PATH": "/x"}, False),
    ],
)
def test_some_variables_only_take_effect_at_the_start(
    other: dict[str, str], expected: bool
) -> None:
    assert needs_start({"A": "1"}, other) is expected


def test_the_number_is_a_setting() -> None:
    assert configured_maximum({}) == 256
    assert configured_maximum({SETTING: "0"}) == 0
    for wrong in ("-1", "many", "1.5", "257", "9" * 5000):
        with pytest.raises(InvalidRequest, match=SETTING):
            configured_maximum({SETTING: wrong})


# A sandbox's first run ---------------------------------------------------------------------------


def waiting(directory: Path, record: object) -> Path:
    directory.mkdir(parents=True)
    (directory / "kernel.json").write_text(json.dumps(record))
    return directory


def test_one_is_taken_with_what_its_environment_lacks(tmp_path: Path) -> None:
    source = waiting(tmp_path / "kernel", {"A": "1", "B": "2"})
    target = tmp_path / "contexts" / "default"
    assert take(source, target, {"A": "1", "B": "3", "C": "4"}) == {"B": "3", "C": "4"}
    assert list(target.iterdir()) == []
    assert not source.exists()


@pytest.mark.parametrize("record", [{"A": 1}, [], {"A": "1", "TZ": "UTC"}, None])
def test_one_that_does_not_fit_is_none(tmp_path: Path, record: object) -> None:
    source = waiting(tmp_path / "kernel", record)
    assert take(source, tmp_path / "contexts" / "default", {"A": "1"}) is None
    assert take(tmp_path / "nowhere", tmp_path / "contexts" / "default", {"A": "1"}) is None


class FakeKernels:
    """Starts bridges that answer with ``done`` to anything, and notes what it is asked for."""

    def __init__(self, interpreter: Interpreter) -> None:
        self.interpreter = interpreter
        self.launched: list[Mapping[str, str]] = []
        self.ended: list[str] = []

    def environment(self, owner: str, environment: Mapping[str, str]) -> dict[str, str]:
        return {"HOST": "1", **environment}

    async def launch(
        self, owner: str, context: str, directory: Path, cwd: str, environment: Mapping[str, str]
    ) -> None:
        self.launched.append(environment)
        directory.mkdir(parents=True, exist_ok=True)

    async def start(self, directory: Path, language: str, cwd: str) -> None:
        raise KernelFailed("There is none in a test.")

    def kill(self, owner: str, context: str) -> None:
        self.ended.append(context)

    async def end(self, owner: str, context: str) -> None:
        self.ended.append(context)


@pytest.fixture
def interpreter(tmp_path: Path) -> Interpreter:
    interpreter = Interpreter(StatePaths(tmp_path / "state").ensure(), None)  # type: ignore[arg-type]
    interpreter.kernels = FakeKernels(interpreter)  # type: ignore[assignment]
    (interpreter.paths.sandboxes / "sbx").mkdir()
    return interpreter


@contextmanager
def answering(directory: Path, *answers: bytes) -> Iterator[list[Any]]:
    """A bridge that gives one answer to each connection; the requests that it got."""
    listener, requests = listen(directory), []

    def serve() -> None:
        for answer in answers:
            with suppress(OSError), listener.accept()[0] as connection:
                requests.append(json.loads(connection.makefile("rb").readline()))
                connection.sendall(answer)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield requests
    finally:
        listener.close()


@asynccontextmanager
async def usable() -> AsyncIterator[Mapping[str, str]]:
    yield {"BAKED": "1", "OWN": "2"}


async def first_run(interpreter: Interpreter) -> list[CodeFrame]:
    access = Access("sbx", usable, lambda: False, {"BAKED": "1"}, {"OWN": "2"})
    async with aclosing(interpreter.run(access, RunCode("1"))) as frames:
        return [frame async for frame in frames]


async def test_the_first_run_takes_the_kernel_that_waited(interpreter: Interpreter) -> None:
    noted: list[object] = []
    interpreter.note_use = lambda *what: noted.append(what)
    place = waiting(interpreter.paths.sandboxes / "sbx" / "kernel", {"HOST": "1", "BAKED": "1"})
    done = b'{"kind": "done", "execution_count": 1, "duration_ms": 3}\n'
    with answering(place, b'{"kind": "ready"}\n', done) as requests:
        started, last = await first_run(interpreter)
    assert (started.restarted, last.execution_count) == (False, 1)
    adopt = {"op": "adopt", "environment": {"OWN": "2"}, "cwd": "/workspace"}
    assert (requests[0], requests[1]["code"]) == (adopt, "1")
    assert noted == [("sbx", {"HOST": "1", "BAKED": "1"})]
    assert [each.id for each in interpreter.list_all("sbx")] == ["default"]
    assert interpreter.kernels.launched == []  # type: ignore[attr-defined]


@pytest.mark.parametrize("answer", [b'{"kind": "failed"}\n', b"{\n", b""])
async def test_one_that_does_not_do_as_asked_is_replaced(
    interpreter: Interpreter, answer: bytes
) -> None:
    place = waiting(interpreter.paths.sandboxes / "sbx" / "kernel", {"HOST": "1"})
    with answering(place, answer), pytest.raises(KernelFailed, match="none in a test"):
        await first_run(interpreter)
    assert interpreter.kernels.launched == [{"BAKED": "1", "OWN": "2"}]  # type: ignore[attr-defined]
    assert set(interpreter.kernels.ended) == {"default"}  # type: ignore[attr-defined]
    assert interpreter.list_all("sbx") == []
    assert not place.exists()


async def test_one_that_does_not_fit_is_ended(interpreter: Interpreter) -> None:
    place = waiting(interpreter.paths.sandboxes / "sbx" / "kernel", {"TZ": "UTC"})
    with pytest.raises(KernelFailed):
        await first_run(interpreter)
    assert interpreter.kernels.ended[0] == "default"  # type: ignore[attr-defined]
    assert not place.exists()


async def test_a_context_that_was_being_restarted_stays_one(interpreter: Interpreter) -> None:
    """Its files are removed first, and the agent may be killed at any moment from then on."""
    directory = interpreter.paths.sandboxes / "sbx" / "contexts" / "mine"
    directory.parent.mkdir()
    _write_record(directory, Record("mine", "python", "/", 1.0))
    access = Access("sbx", usable, lambda: False)
    with pytest.raises(KernelFailed):
        await interpreter.restart(access, "mine")
    (directory / "starting").touch()
    (directory / "status").touch()
    waiting(interpreter.paths.sandboxes / "sbx" / "kernel", {})
    (directory.parent / "unknown").mkdir()
    interpreter.kernels.ended.clear()  # type: ignore[attr-defined]
    interpreter.recover("sbx")
    assert sorted(interpreter.kernels.ended) == ["default", "mine", "unknown"]  # type: ignore[attr-defined]
    assert [each.id for each in interpreter.list_all("sbx")] == ["mine"]
    assert [path.name for path in directory.iterdir()] == ["context.json"]
    assert [path.name for path in (directory.parents[1]).iterdir()] == ["contexts"]


async def test_one_whose_caller_leaves_before_it_has_its_variables_is_ended(
    interpreter: Interpreter,
) -> None:
    place = waiting(interpreter.paths.sandboxes / "sbx" / "kernel", {"HOST": "1"})
    with closing(listen(place)) as listener:
        listener.setblocking(False)  # noqa: FBT003 - positional-only
        running = asyncio.create_task(first_run(interpreter))
        with closing((await asyncio.get_running_loop().sock_accept(listener))[0]):
            running.cancel()
            with pytest.raises(asyncio.CancelledError):
                await running
    assert interpreter.kernels.ended == ["default"]  # type: ignore[attr-defined]
    assert not (interpreter.paths.sandboxes / "sbx" / "contexts" / "default").exists()

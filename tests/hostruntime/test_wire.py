"""What the web and the agent say to each other, and that either may be newer than the other."""

from __future__ import annotations

import json
import pkgutil
from collections.abc import AsyncGenerator, Callable, Iterator
from datetime import date
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import AsyncMock, MagicMock

import httpx
import pytest

import hostruntime.wire
from hostruntime.agent.routes import application
from hostruntime.container.exec import Chunk, Frame, Started
from hostruntime.errors import ExecKilled, HostFault, HostFull, InvalidRequest
from hostruntime.sandbox.record import read_sandbox
from hostruntime.wire.background import (
    CommandFrame,
    CommandInfo,
    CommandList,
    CommandOutput,
    FollowCommand,
    StartCommand,
)
from hostruntime.wire.builds import BuildEvent, BuildInfo, Cache, StartBuild
from hostruntime.wire.commands import Exec, ExecFrame, Quota, RefusedRequest, RunningCommands
from hostruntime.wire.files import (
    DirectoryEntries,
    DirectoryEntry,
    EditedFile,
    EditFile,
    FilePart,
    FileStat,
    MakeDirectory,
    MoveFile,
    Survey,
    WantedPart,
    WrittenFile,
)
from hostruntime.wire.health import (
    CapacityStatus,
    DefaultDomains,
    DiskStatus,
    EgressDecision,
    EgressHost,
    EgressHosts,
    Health,
)
from hostruntime.wire.images import BaseInfo, Bases, ImageInfo, Images, ImageUsage, Progress
from hostruntime.wire.interpreter import (
    CodeError,
    CodeFrame,
    CodeResult,
    ContextInfo,
    ContextList,
    CreateContext,
    RunCode,
)
from hostruntime.wire.message import MalformedError, Message, decode, encode, from_fields
from hostruntime.wire.ports import OpenedPort, OpenPort
from hostruntime.wire.reconciliation import (
    Agree,
    Claim,
    InstallationInfo,
    Quarantine,
    QuarantinedItemInfo,
    Reconcile,
    Reconciliation,
)
from hostruntime.wire.resources import Resources
from hostruntime.wire.sandboxes import (
    ChangesInfo,
    CollectedUsage,
    CreateSandbox,
    CreateSnapshot,
    DailyUsage,
    DeletedSandbox,
    MetricsHistory,
    MetricsPoint,
    MetricsSample,
    ResourceUsage,
    Sandboxes,
    SandboxInfo,
    SandboxMetrics,
    SetDeadline,
    SnapshotInfo,
    Snapshots,
    Usage,
    UsageInfo,
)
from hostruntime.wire.transfers import OpenTransfer, TransferAnswer
from hostruntime.wire.volumes import AttachVolume, VolumeInfo, Volumes
from tests.host.client import HostClient

SANDBOX = SandboxInfo("sbx", "debian-12", "gone", 1.5, 31.25, None, reason="expired", held=True)
SNAPSHOT = SnapshotInfo("snap", "sbx", "debian-12", 64, 1 << 40, 2.5, 3.25)
DAY = DailyUsage(1.5, 2.5, day=date(2026, 11, 30))
SAMPLE = MetricsSample(1.5, 0.25, 4096)
POINT = MetricsPoint(1.5, 30.0, 7.5, 4096, 8192, 100, 200)
USED = UsageInfo("sbx", ended=False, before=ResourceUsage(0.5), days=(DAY,))
IMAGE = ImageInfo("img", "template", "debian-12", 1.0, 2, 3, 4, "sha256:x")
BASE = BaseInfo("node-22", "Node 22", "What it is.", "failed", None, "x", "no mirror")
MAKING = BaseInfo("code-interpreter", "C", "It.", "building", on_request=True, progress="now")
HELD = QuarantinedItemInfo("image.img", "image", "img", "unknown", "nobody names it", 1.0)
DECISION = EgressDecision(1.0, "sbx", "bücher.example", 443, "refused", "not_listed")
HOST = EgressHost("example.org", 443, 1, 2, "listed", "It is.", 1.0, 10, 20)
ENTRY = DirectoryEntry("grüße\n", is_dir=False, size=5, mode=0o4755, modified_at=1.5)
CLAIM = Claim("i", 7, "mark", "before")

UNLISTED = RefusedRequest("example.org", 443, "not_listed")
COMMAND = CommandInfo(
    "cmd", "true", 3, running=False, started_at=1.5, code=137, signal=9, refused=(UNLISTED,)
)

CONTEXT = ContextInfo("ctx", "python", "/workspace", 1.5, 2.5, executions=3, alive=False)
RESULT = CodeResult("x", "<b>", "<svg/>", "eA==", [1, {"a": None}], {"type": "line"})
RAISED = CodeError("ValueError", "größe", ("line", "line"))

MESSAGES: list[Message] = [
    Resources(cpu=0.5, memory_mb=64, disk_mb=16),
    CreateSandbox("sbx", "img", cpu=1.5, memory_mb=512, allow_domains=["a.b"], env={"A": "1"}),
    CreateSandbox("sbx", snapshot="snap", cpu=1, memory_mb=512, deadline=1e9),
    StartBuild("img", "debian-12", ["true"], "open", disk_mb=64, cache=Cache("team", reuse=True)),
    Cache("team"),
    BuildInfo("img", "failed", 3, {"code": "x", "step": 1, "refused": [{"host": "a"}]}),
    BuildEvent(1, 1.5, "output", {"step": 1, "text": "\x00grüße\n"}),
    BuildEvent(2, 2.0, "failed", {"code": "no_room", "message": "Full."}),
    CreateSandbox("sbx", "img", cpu=1, memory_mb=512, volume=AttachVolume("vol", 256, new=True)),
    AttachVolume("vol", 10_240),
    VolumeInfo("vol", 256, 1_000_000, "sbx"),
    Volumes((VolumeInfo("vol", 256, 0),)),
    Exec("true", env={"A": "1"}, timeout_seconds=None, quota=Quota("team", 0)),
    Exec(["echo", "$HOME"], max_output_bytes=0),
    Quota("team", 3),
    ExecFrame("chunk", stream="stdout", data=bytes(range(256))),
    ExecFrame("exited", code=137, signal=9, duration_ms=3, out_of_memory=True, truncated=True),
    ExecFrame("error", error_code="exec_timeout", message="Late.", duration_ms=5),
    RefusedRequest("192.0.2.1", 22, "past_proxy", direct=True),
    ExecFrame("exited", code=7, refused=(UNLISTED,)),
    RunningCommands({"team": 2}),
    StartCommand("cmd", "echo größe", cwd="/", env={"A": "1"}),
    COMMAND,
    CommandList((COMMAND,)),
    CommandOutput(bytes(range(256)), 5, 261, COMMAND),
    FollowCommand(5, 1.5),
    CommandFrame("output", b"\xff\x00", 7),
    CommandFrame("ended", offset=9, command=COMMAND),
    CreateContext("ctx", "c++", cwd="/"),
    CONTEXT,
    ContextList((CONTEXT,)),
    RunCode("1 + größe", "javascript", "ctx", 1.5, Quota("team", 1)),
    RESULT,
    RAISED,
    CodeFrame("started", context_id="ctx", restarted=True),
    CodeFrame("result", result=RESULT),
    CodeFrame("done", error=RAISED, execution_count=3, lost="It has.", truncated=("stdout",)),
    SetDeadline(None),
    CreateSnapshot("snap"),
    SANDBOX,
    Sandboxes((SANDBOX,)),
    ChangesInfo("run", 3, whole=True, sandboxes=(SANDBOX,)),
    SNAPSHOT,
    Snapshots((SNAPSHOT,)),
    ResourceUsage(1.0, 2.0),
    SAMPLE,
    SandboxMetrics("sbx", 1024, ResourceUsage(1.0, 2.0), (SAMPLE,)),
    POINT,
    MetricsHistory((POINT, MetricsPoint(2.5, 30.0, 0.0, 1))),
    DAY,
    USED,
    Usage((USED,)),
    DeletedSandbox(),
    DeletedSandbox(USED),
    CollectedUsage(["sbx"]),
    MakeDirectory("/a", parents=False),
    MoveFile("/a", "/b"),
    WrittenFile("/a", 5),
    EditFile("/a", "alt", "größe\n", None),
    EditedFile("/a", 5, 2, 1),
    FilePart(FileStat("/workspace/a", exists=True, size=9), 3, 4),
    FileStat("/a", exists=False),
    ENTRY,
    DirectoryEntries((ENTRY,)),
    Survey("ff00", (("größe",), None)),
    BASE,
    Bases((BASE, MAKING)),
    IMAGE,
    Images((IMAGE,)),
    ImageUsage(10, 4, 6, 1),
    Progress("progress", "Unpacking."),
    Progress("done", image=IMAGE),
    Progress("error", error={"code": "host_fault", "detail": "No."}),
    OpenPort("sbx", 65535),
    OpenTransfer("sbx", "/workspace/a", wanted=WantedPart(0, 9)),
    OpenTransfer("sbx", "/workspace/a", 0),
    TransferAnswer(part=FilePart(FileStat("/a", exists=True, size=9), 3, 6)),
    TransferAnswer({"code": "no_space", "detail": "It is full."}),
    TransferAnswer(written=5_000_000_000),
    OpenedPort({"code": "port_closed", "detail": "Nothing listens."}),
    CLAIM,
    Agree("i", 7, "mark", known=True),
    InstallationInfo("i", 7, "Another's.", 1.0),
    Reconcile(CLAIM, images=["img"], snapshots=None),
    Reconciliation(["img"], ["snap"]),
    HELD,
    Quarantine((HELD,)),
    DiskStatus("low", 100, 20, 30, 5, 1, held=2, ballast=True),
    Health("1", "/var", 0, "v2", {"healthy": True}, {"images": 1}, ["A note."], DiskStatus(held=1)),
    CapacityStatus(3, 200, 3072, 65536, 3.0, 256.0, 8000, 512),
    DefaultDomains(["example.org"]),
    HOST,
    EgressHosts((HOST,)),
    DECISION,
]
# Of a field that the other side has and this one has never heard of.
NEWER = {"x_new": {"of": [1, None]}}


def all_kinds(of: type[Message] = Message) -> Iterator[type[Message]]:
    for module in pkgutil.iter_modules(hostruntime.wire.__path__):
        import_module(f"hostruntime.wire.{module.name}")
    for kind in of.__subclasses__():
        if kind.__module__.startswith("hostruntime.wire."):
            yield kind
            yield from all_kinds(kind)


def newer(value: Any) -> Any:
    """JSON of a later version: every object in it that is a message's has one more field."""
    if isinstance(value, list):
        return [newer(item) for item in value]
    if isinstance(value, dict):
        return {name: newer(item) for name, item in value.items()} | NEWER
    return value


# What the other side may be ----------------------------------------------------------------------


def test_every_message_is_looked_at() -> None:
    assert {type(message) for message in MESSAGES} == set(all_kinds())


@pytest.mark.parametrize("message", MESSAGES, ids=lambda one: type(one).__name__)
def test_what_is_sent_is_what_arrives(message: Message) -> None:
    assert decode(type(message), encode(message)) == message
    assert decode(type(message), encode(message, brief=True)) == message


@pytest.mark.parametrize(
    # The data of an event, and what is a mapping, take whatever there is.
    "message",
    [one for one in MESSAGES if not isinstance(one, BuildEvent)],
    ids=lambda one: type(one).__name__,
)
def test_a_field_of_a_newer_side_is_left_out(message: Message) -> None:
    wire = json.loads(encode(message)) | NEWER
    assert decode(type(message), json.dumps(wire)) == message


@pytest.mark.parametrize("message", [SANDBOX, IMAGE, HELD, HOST, BASE, InstallationInfo()])
def test_a_field_that_an_older_side_does_not_have_takes_its_default(message: Message) -> None:
    brief = json.loads(encode(message, brief=True))
    assert decode(type(message), json.dumps(brief)) == message


@pytest.fixture
def agent() -> MagicMock:
    """A host behind an agent of this version."""
    host = MagicMock()
    host.sandboxes.create = AsyncMock(return_value=(MagicMock(), True))
    host.sandboxes.info = MagicMock(return_value=SANDBOX)
    host.builds.start = AsyncMock(return_value=(BuildInfo("img", "running"), True))
    return host


async def posted(host: MagicMock, path: str, body: object) -> httpx.Response:
    transport = httpx.ASGITransport(application(host))
    async with httpx.AsyncClient(transport=transport, base_url="http://host") as http:
        return await http.post(path, json=body)


async def test_an_older_agent_serves_a_newer_web(agent: MagicMock) -> None:
    wanted = CreateSandbox("sbx", "img", cpu=1, memory_mb=512)
    answer = await posted(agent, "/sandboxes", json.loads(encode(wanted)) | NEWER)
    assert (answer.status_code, answer.json()["id"]) == (201, "sbx")
    agent.sandboxes.create.assert_awaited_once_with(wanted)
    build = StartBuild("img", "debian-12", ["true"], "open", cache=Cache("team"))
    body = json.loads(encode(build))
    answer = await posted(agent, "/builds", body | {"cache": body["cache"] | NEWER} | NEWER)
    assert answer.status_code == 202
    agent.builds.start.assert_awaited_once_with(build)


async def test_a_newer_agent_serves_an_older_web(agent: MagicMock) -> None:
    """What a web of the first version said is all that has no default."""
    answer = await posted(agent, "/sandboxes", {"id": "sbx", "cpu": 1, "memory_mb": 64})
    assert answer.status_code == 201
    agent.sandboxes.create.assert_awaited_once_with(CreateSandbox("sbx", cpu=1, memory_mb=64))


Answering = Callable[[Any], HostClient]


@pytest.fixture
def answering(tmp_path: Path) -> Answering:
    """A client of this version of an agent that answers one thing."""

    def client(answer: Any) -> HostClient:
        made = HostClient(tmp_path / "host.sock")
        transport = httpx.MockTransport(lambda _: httpx.Response(200, json=answer))
        made._http = httpx.Client(transport=transport, base_url="http://host")
        return made

    return client


def test_an_older_web_understands_a_newer_agent(answering: Answering) -> None:
    sandboxes = newer(json.loads(encode(Sandboxes((SANDBOX, SANDBOX)))))
    assert answering(sandboxes).sandboxes() == [SANDBOX, SANDBOX]
    usage = newer(json.loads(encode(Usage((USED,)))))
    assert answering(usage).usage() == [USED]
    changes = newer({"run": "r", "seq": 1, "whole": True, "sandboxes": []})
    assert answering(changes).changes("r", 0, seconds=0) == ChangesInfo("r", 1, whole=True)
    progress = newer(json.loads(encode(Progress("done", image=IMAGE))))
    progress["error"] = None
    assert list(answering(progress).ensure_base("node-22")) == [Progress("done", image=IMAGE)]


def test_a_newer_web_understands_an_older_agent(answering: Answering) -> None:
    first = {"id": "sbx", "image": "i", "state": "running", "started_at": 1, "boot_ms": 2}
    found = answering({"sandboxes": [first | {"deadline": None}]}).sandboxes()
    assert found == [SandboxInfo("sbx", "i", "running", 1.0, 2.0, None)]


def test_an_answer_that_is_none_is_the_agents_fault(answering: Answering) -> None:
    with pytest.raises(HostFault, match=r"sandboxes\.0\.id: "):
        answering({"sandboxes": [{"id": 5}]}).sandboxes()
    with pytest.raises(HostFault):
        answering([]).health()


def test_the_failure_of_a_base_comes_as_what_it_was(answering: Answering) -> None:
    line = json.loads(encode(Progress("error", error=HostFull("It is full.").to_wire())))
    with pytest.raises(HostFull, match="It is full"):
        list(answering(line).ensure_base("node-22"))


def test_whoever_waits_for_a_base_hears_that_there_is_nothing_new(tmp_path: Path) -> None:
    done = encode(Progress("done", image=IMAGE))
    client = HostClient(tmp_path / "host.sock")
    transport = httpx.MockTransport(lambda _: httpx.Response(200, content=b"\n" + done + b"\n"))
    client._http = httpx.Client(transport=transport, base_url="http://host")
    lines = list(client.ensure_base("node-22"))
    assert lines == [Progress("progress"), Progress("done", image=IMAGE)]


async def test_a_command_that_is_killed_says_by_what(agent: MagicMock) -> None:
    """What happens once a command runs can only be said in its stream."""

    async def frames() -> AsyncGenerator[Frame]:
        yield Started(7)
        yield Chunk("stdout", b"abc")
        raise ExecKilled("It ended.", signal=9)

    agent.sandboxes.exec = MagicMock(return_value=frames())
    answer = await posted(agent, "/sandboxes/sbx/exec", {"command": "true", "max_output_bytes": 2})
    assert [decode(ExecFrame, line) for line in answer.content.splitlines()] == [
        ExecFrame("started", pid=7),
        ExecFrame("chunk", stream="stdout", data=b"ab"),
        ExecFrame("error", error_code=ExecKilled.code, message="It ended.", signal=9),
    ]
    agent.sandboxes.exec.assert_called_once_with("sbx", Exec("true", max_output_bytes=2))


def test_a_sandbox_that_was_written_down_before_there_was_a_wire_is_read(tmp_path: Path) -> None:
    request = {
        "id": "sbx_old",
        "image": "debian-12",
        "network": "restricted",
        "allow_domains": ["a.example"],
        "cpu": 1.5,
        "memory_mb": 512,
        "disk_mb": 64,
        "env": {"A": "1"},
        "deadline": 1e9,
        "snapshot": "snap_old",
    }
    known = {"image_id": "debian-12@1", "image_tree": "/t", "deadline": 1e9, "state": "running"}
    directory = tmp_path / "sbx_old"
    directory.mkdir()
    (directory / "sandbox.json").write_text(json.dumps({"request": request, **known}))
    sandbox = read_sandbox(directory)
    assert sandbox is not None and sandbox.request == CreateSandbox(
        "sbx_old",
        "debian-12",
        "snap_old",
        "restricted",
        ["a.example"],
        {"A": "1"},
        1e9,
        cpu=1.5,
        memory_mb=512,
        disk_mb=64,
    )


# What is refused ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        {"cpu": 0.05},
        {"cpu": 257},
        {"cpu": "1"},
        {"cpu": None},
        {"memory_mb": 31},
        {"memory_mb": 64.5},
        {"memory_mb": 1024 * 1024 + 1},
        {"disk_mb": 15},
        {"disk_mb": True},
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "message",
    [
        CreateSandbox("sbx", "img", cpu=1, memory_mb=64),
        StartBuild("img", "debian-12", ["true"], "off"),
    ],
    ids=lambda one: type(one).__name__,
)
def test_a_sandbox_and_a_build_have_the_same_bounds(
    message: Message, wrong: dict[str, object]
) -> None:
    (name,) = wrong
    with pytest.raises(MalformedError, match=f"^{name}: "):
        decode(type(message), json.dumps(json.loads(encode(message)) | wrong))


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [
        (CreateSandbox, {"id": "sbx", "image": "i", "cpu": 1}),
        (CreateSandbox, {"id": "sbx", "image": "i", "cpu": 1, "memory_mb": 64, "deadline": "now"}),
        (CreateSandbox, {"id": "sbx", "image": "i", "cpu": 1, "memory_mb": 64, "env": {"A": 1}}),
        (StartBuild, {"id": "i", "base_image": "b", "network": "off", "recipe": []}),
        (StartBuild, {"id": "i", "base_image": "b", "network": "off", "recipe": ["true"] * 101}),
        (StartBuild, {"id": "i", "base_image": "b", "network": "off", "recipe": "true"}),
        (Exec, {"command": []}),
        (Exec, {"command": None}),
        (Exec, {"command": ["a", 1]}),
        (Exec, {"command": "true", "timeout_seconds": 0}),
        (Exec, {"command": "true", "timeout_seconds": 86_401}),
        (Exec, {"command": "true", "max_output_bytes": -1}),
        (Exec, {"command": "true", "quota": {"scope": "", "most": 1}}),
        (SetDeadline, {}),
        (Claim, {"id": "", "epoch": 1, "mark": "m"}),
        (Claim, {"id": "i", "epoch": -1, "mark": "m"}),
        (MakeDirectory, {"path": 1}),
        (OpenPort, {"sandbox": "sbx", "port": 0}),
        (OpenPort, {"sandbox": "sbx", "port": 65536}),
        (OpenTransfer, {"sandbox": "sbx", "path": "/a", "size": -1}),
        (FilePart, {"stat": {"path": "/a", "exists": True}, "first": 0, "length": -1}),
    ],
    ids=str,
)
def test_a_request_that_makes_no_sense_is_refused(
    kind: type[Message], wrong: dict[str, object]
) -> None:
    with pytest.raises(MalformedError):
        decode(kind, json.dumps(wrong))


@pytest.mark.parametrize(
    "message", [DECISION, FileStat("/a", exists=False), DirectoryEntries((ENTRY,))]
)
def test_what_others_wrote_is_held_against_its_type(message: Message) -> None:
    fields = json.loads(encode(message))
    assert from_fields(type(message), fields | NEWER) == message
    name = next(iter(fields))
    wrongs: list[object] = [{**fields, name: None}, {**fields, name: {}}, [], None]
    for wrong in wrongs:
        with pytest.raises(MalformedError):
            from_fields(type(message), wrong)


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b'{"id": NaN}', b"\xff"], ids=str)
def test_what_is_no_message_is_refused(body: bytes) -> None:
    with pytest.raises(MalformedError):
        decode(SetDeadline, body)


async def test_the_agent_says_what_is_wrong_in_one_sentence(agent: MagicMock) -> None:
    answer = await posted(agent, "/sandboxes", {"id": "sbx", "cpu": 0, "memory_mb": 64})
    assert (answer.status_code, answer.json()["code"]) == (400, InvalidRequest.code)
    assert answer.json()["detail"] == "cpu: Input should be greater than or equal to 0.1."
    agent.sandboxes.create.assert_not_called()

"""A host agent in memory: the interface of ``hostruntime.client.host_client`` without a host.

It keeps what it is told (images, builds with their numbered events, sandboxes with their files)
and fails on request (``down``, ``full``, ``stop_streams``). It runs no command: what a command
answers is put into ``answers`` before. ``tests/fakes/test_host.py`` holds it to the signatures of
the real client; what it does is held to the real agent by the tests on a live stack.
"""

from __future__ import annotations

import asyncio
import posixpath
import threading
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from hostruntime.client.calls import DEFAULT_MAX_FILE_BYTES
from hostruntime.errors import (
    ContainerGone,
    ContainerPaused,
    FileConflict,
    FileTooLarge,
    HostError,
    HostFull,
    HostUnavailable,
    ImageNotFound,
    NotFound,
)
from hostruntime.wire.builds import BuildEvent, BuildInfo, StartBuild
from hostruntime.wire.commands import Exec, ExecFrame, ExecResult
from hostruntime.wire.files import DirectoryEntry, DirectoryListing, FileContent, FileStat
from hostruntime.wire.health import EgressHost
from hostruntime.wire.images import ImageInfo, ImageUsage
from hostruntime.wire.sandboxes import (
    CreateSandbox,
    MetricsPoint,
    MetricsSample,
    ResourceUsage,
    SandboxInfo,
    SandboxMetrics,
    UsageInfo,
)
from tests.fakes.background import FakeBackground
from tests.fakes.bases import FakeBases
from tests.fakes.changes import FakeChanges
from tests.fakes.commands import FakeCommands, Ran
from tests.fakes.interpreter import FakeInterpreter
from tests.fakes.keeping import FakeKeeping
from tests.fakes.snapshots import FakeSnapshots
from tests.fakes.transfers import FakeTransfers
from tests.fakes.volumes import FakeVolumes

TERMINAL = frozenset({"published", "failed"})
ENDED_IN = {"published": "published", "failed": "failed"}


@dataclass
class FakeBuild:
    """One build: what was asked for, and what it told so far."""

    request: StartBuild
    state: str = "running"
    events: list[BuildEvent] = field(default_factory=list)
    starts: int = 1


@dataclass
class FakeSandbox:
    """One sandbox, its files by absolute path, and its variables."""

    info: SandboxInfo
    env: dict[str, str]
    files: dict[str, bytes] = field(default_factory=dict)
    directories: set[str] = field(default_factory=lambda: {"/", "/workspace", "/tmp", "/etc"})


class FakeHost(
    FakeBases,
    FakeCommands,
    FakeInterpreter,
    FakeBackground,
    FakeTransfers,
    FakeSnapshots,
    FakeVolumes,
    FakeKeeping,
    FakeChanges,
):
    """``HostClient`` and ``AsyncHostClient`` in one, as seen by services; thread-safe."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Condition()
        self.down = False
        self.full = False
        self.by_itself = True
        self.stored: dict[str, ImageInfo] = {}
        self.built: dict[str, FakeBuild] = {}
        self.booted: dict[str, FakeSandbox] = {}
        self.taken = {}
        self.persisted = {}
        self.ran: list[Ran] = []
        self.answers: dict[str, ExecResult | HostError] = {}
        self.frames: dict[str, list[ExecFrame | HostError]] = defaultdict(list)
        self.ended_early: list[str] = []
        self.modes: dict[tuple[str, str], int | None] = {}
        self.used: dict[str, UsageInfo] = {}
        self.egress: dict[str, list[EgressHost]] = {}
        self.next_failure: dict[str, Any] | None = None
        # What each step that succeeds was refused all the same.
        self.refused: list[dict[str, Any]] = []
        self.streams = 0
        self._epoch = 0

    # What tests do to it ------------------------------------------------------------------

    def emit(self, build_id: str, kind: str, **data: Any) -> BuildEvent:
        """The next event of a build; a terminal one ends it and stores or drops its image."""
        with self.lock:
            build = self.built[build_id]
            event = BuildEvent(len(build.events) + 1, time.time(), kind, data)
            build.events.append(event)
            if kind in TERMINAL:
                build.state = ENDED_IN[kind]
                if kind == "published":
                    sizes = {name: data.get(name, 0) for name in ("size_bytes", "shared_bytes")}
                    self.stored[build_id] = ImageInfo(build_id, "template", **sizes)
            self.lock.notify_all()
            return event

    def finish(self, build_id: str) -> None:
        """Run every step of a build and publish."""
        recipe = self.built[build_id].request.recipe
        self.emit(build_id, "boot", boot_ms=31.5)
        for number, command in enumerate(recipe, start=1):
            self.run_step(build_id, number, command, f"{command}: done\n")
        self.emit(build_id, "scrub", removed_bytes=10, duration_ms=1)
        sizes = {"size_bytes": 5_000, "file_count": 42, "shared_bytes": 4_000}
        self.emit(build_id, "capture", **sizes, duration_ms=2)
        self.emit(build_id, "published", image=build_id, **sizes, total_ms=1234)

    def run_step(
        self, build_id: str, number: int, command: str, text: str = "", code: int = 0
    ) -> None:
        """One step from its start to its end."""
        total = len(self.built[build_id].request.recipe)
        self.emit(build_id, "step_started", step=number, total=total, command=command)
        if text:
            self.emit(build_id, "output", step=number, text=text)
        self.emit(
            build_id,
            "step_finished",
            step=number,
            exit_code=code,
            signal=None,
            duration_ms=7,
            output_bytes=len(text.encode()),
            elided_bytes=0,
            refused=self.refused,
        )

    def stop_streams(self) -> None:
        """What a restart of the agent looks like: every open stream breaks off."""
        with self.lock:
            self._epoch += 1
            self.lock.notify_all()

    def lose(self, build_id: str) -> None:
        """Forget a build, as a host whose state was wiped does."""
        with self.lock:
            del self.built[build_id]
        self.stop_streams()

    def end(self, sandbox_id: str, reason: str) -> None:
        """A sandbox's container goes away by itself."""
        with self.lock:
            sandbox = self.booted[sandbox_id]
            sandbox.info = replace(sandbox.info, state="gone", reason=reason, ended_at=time.time())
        self.note_change(sandbox_id)

    def wait_for(self, condition: Any, seconds: float = 10.0) -> None:
        """Return once ``condition()`` holds, looking whenever the host's state changes."""
        with self.lock:
            assert self.lock.wait_for(condition, seconds), "it did not come about"

    def _up(self) -> None:
        if self.down:
            raise HostUnavailable("The host agent does not answer.")

    async def ask(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """As the async client: the method of that name, without blocking the event loop."""
        return await asyncio.to_thread(getattr(self, name), *args, **kwargs)

    # Bases and images ---------------------------------------------------------------------

    def default_domains(self) -> list[str]:
        """As the client."""
        self._up()
        return ["github.com", "example.org"]

    def egress_hosts(self, owner: str) -> list[EgressHost]:
        self._up()
        return self.egress.get(owner, [])

    def images(self) -> list[ImageInfo]:
        """As the client."""
        self._up()
        return list(self.stored.values())

    def image_usage(self, image_id: str) -> ImageUsage:
        """As the client, of what was said when it was published."""
        self._up()
        with self.lock:
            if image_id not in self.stored:
                raise ImageNotFound(f"There is no image {image_id}.")
            image = self.stored[image_id]
            users = sum(box.info.image == image_id for box in self.booted.values())
            own = image.size_bytes - image.shared_bytes
            return ImageUsage(image.size_bytes, image.shared_bytes, own, users)

    def delete_image(self, image_id: str) -> bool:
        """As the client."""
        self._up()
        with self.lock:
            in_use = any(
                box.info.image == image_id and box.info.state == "running"
                for box in self.booted.values()
            )
            if not in_use:
                self.stored.pop(image_id, None)
            return not in_use

    # Builds -------------------------------------------------------------------------------

    def start_build(self, request: StartBuild) -> BuildInfo:
        """As the client; runs to its end at once if ``by_itself``."""
        self._up()
        if self.full:
            raise HostFull("There is no room.")
        if not self.is_bootable(request.base_image) and request.base_image not in self.stored:
            raise ImageNotFound(f"There is no image {request.base_image}.")
        with self.lock:
            known = self.built.get(request.id)
            if known is not None:
                known.starts += 1
                return self.build(request.id)
            self.built[request.id] = FakeBuild(request)
            self.lock.notify_all()
        if self.by_itself:
            self._end_build(request.id)
        return self.build(request.id)

    def _end_build(self, build_id: str) -> None:
        failure, self.next_failure = self.next_failure, None
        if failure is None:
            self.finish(build_id)
        else:
            self.emit(build_id, "failed", **failure)

    def build(self, build_id: str) -> BuildInfo:
        """As the client."""
        self._up()
        with self.lock:
            build = self.built.get(build_id)
            if build is None:
                raise NotFound(f"There is no build {build_id}.")
            return BuildInfo(build_id, build.state, len(build.events))

    def cancel_build(self, build_id: str, *, keep_published: bool = False) -> BuildInfo:
        """As the client."""
        self._up()
        with self.lock:
            build = self.built.setdefault(
                build_id, FakeBuild(StartBuild(build_id, "", [], "off"), starts=0)
            )
            if build.state == "published" and keep_published:
                return self.build(build_id)
            if build.state == "running":
                self.emit(
                    build_id, "failed", code="build_cancelled", message="The build was cancelled."
                )
            build.state = "cancelled"
        self.delete_image(build_id)
        return self.build(build_id)

    def build_events(
        self, build_id: str, after: int = 0, *, follow: bool = True
    ) -> Iterator[BuildEvent]:
        """As the client."""
        self.build(build_id)
        with self.lock:
            epoch = self._epoch
            self.streams += 1
            self.lock.notify_all()
        try:
            yield from self._told(build_id, after, epoch, follow=follow)
        finally:
            with self.lock:
                self.streams -= 1
                self.lock.notify_all()

    def _told(self, build_id: str, after: int, epoch: int, *, follow: bool) -> Iterator[BuildEvent]:
        while True:
            with self.lock:
                if self._epoch != epoch:
                    raise HostUnavailable("The host agent went away.")
                events = self.built[build_id].events[after:]
                if not events and follow:
                    self.lock.wait(timeout=0.5)
                    continue
            for event in events:
                yield event
                after = event.seq
            if not follow or (events and events[-1].kind in TERMINAL):
                return

    # Sandboxes ----------------------------------------------------------------------------

    def sandboxes(self) -> list[SandboxInfo]:
        """As the client."""
        self._up()
        return [box.info for box in self.booted.values()]

    def create_sandbox(self, request: CreateSandbox) -> SandboxInfo:
        """As the client."""
        self._up()
        if self.full:
            raise HostFull("There is no room.")
        image = request.image
        if request.snapshot is not None:
            image = self.image_of(request.snapshot)
        elif not self.is_bootable(image) and image not in self.stored:
            raise ImageNotFound(f"There is no image {image}.")
        with self.lock:
            if request.id not in self.booted:
                if request.volume is not None:
                    self.attach(request.volume)
                now, deadline = time.time(), request.deadline
                info = SandboxInfo(
                    request.id, image, "running", now, 31.5, deadline, request.network
                )
                if request.volume is not None:
                    info = replace(info, volume=request.volume.id)
                self.booted[request.id] = FakeSandbox(info, dict(request.env))
                if request.snapshot is not None:
                    self.restore(request.snapshot, self.booted[request.id])
            return self.booted[request.id].info

    def sandbox(self, sandbox_id: str) -> SandboxInfo:
        """As the client."""
        self._up()
        if sandbox_id not in self.booted:
            raise NotFound(f"There is no sandbox {sandbox_id}.")
        return self.booted[sandbox_id].info

    def set_deadline(self, sandbox_id: str, deadline: float | None) -> SandboxInfo:
        """As the client."""
        box = self._running(sandbox_id)
        box.info = replace(box.info, deadline=deadline)
        return box.info

    def pause_sandbox(self, sandbox_id: str, deadline: float | None) -> SandboxInfo:
        """As the client."""
        return self._set_paused(sandbox_id, deadline, paused=True)

    def resume_sandbox(self, sandbox_id: str, deadline: float | None) -> SandboxInfo:
        """As the client."""
        return self._set_paused(sandbox_id, deadline, paused=False)

    def _set_paused(self, sandbox_id: str, deadline: float | None, *, paused: bool) -> SandboxInfo:
        self._up()
        self.sandbox(sandbox_id)
        box = self.booted[sandbox_id]
        if box.info.state != "running":
            raise ContainerGone("The sandbox is not running.")
        box.info = replace(box.info, deadline=deadline, paused=paused)
        self.note_change(sandbox_id)
        return box.info

    def delete_sandbox(self, sandbox_id: str, collected: Sequence[str] = ()) -> UsageInfo | None:
        """As the client."""
        self._up()
        with self.lock:
            self._forget_used(collected)
            self.booted.pop(sandbox_id, None)
            if sandbox_id in self.used:
                self.used[sandbox_id] = replace(self.used[sandbox_id], ended=True)
            return self.used.get(sandbox_id)

    def usage(self, sandbox_id: str | None = None) -> list[UsageInfo]:
        """As the client: what tests put into ``used``."""
        self._up()
        with self.lock:
            return [info for info in self.used.values() if sandbox_id in (None, info.id)]

    def metrics(self, sandbox_id: str) -> SandboxMetrics:
        """As the client: half a CPU and 100 MB, sampled a moment ago."""
        if self.sandbox(sandbox_id).state != "running":
            raise ContainerGone("The sandbox is not running.")
        samples = tuple(MetricsSample(at, 0.5, 120_000_000) for at in (1000.0, 1002.0))
        total, traffic = ResourceUsage(1.5, 2.5), (3000, 4000)
        return SandboxMetrics(sandbox_id, 100_000_000, total, samples, 2_000_000, *traffic)

    def metrics_history(self, sandbox_id: str, since: float = 0.0) -> list[MetricsPoint]:
        """As the client: two points, of which the second is also among the samples."""
        self._up()
        points = (MetricsPoint(at, 30.0, 15.0, 90_000_000, 1_000_000) for at in (970.0, 1000.0))
        return [point for point in points if point.at > since]

    def acknowledge_usage(self, ids: Sequence[str]) -> None:
        """As the client."""
        self._up()
        with self.lock:
            self._forget_used(ids)

    def _forget_used(self, ids: Sequence[str]) -> None:
        for sandbox_id in ids:
            if sandbox_id in self.used and self.used[sandbox_id].ended:
                del self.used[sandbox_id]

    def exec(self, sandbox_id: str, request: Exec) -> ExecResult:
        """What ``answers`` has for the command; without an answer it ends well and says nothing."""
        self._note(sandbox_id, request)
        answer = self.answers.get(str(request.command), ExecResult(0, None, b"", b"", 3))
        if isinstance(answer, HostError):
            raise answer
        return answer

    async def exec_to_completion(self, sandbox_id: str, request: Exec) -> ExecResult:
        with self.running.track(request.quota):
            return self.exec(sandbox_id, request)

    async def exec_frames(self, sandbox_id: str, request: Exec) -> AsyncIterator[ExecFrame]:
        """What ``frames`` has for the command; an error among them is raised."""
        with self.running.track(request.quota):
            self._note(sandbox_id, request)
        told = False
        try:
            for frame in self.frames[str(request.command)]:
                if isinstance(frame, HostError):
                    raise frame
                yield frame
            told = True
        finally:
            if not told:
                self.ended_early.append(str(request.command))

    def _note(self, sandbox_id: str, request: Exec) -> None:
        merged = {**self._running(sandbox_id).env, **request.env}
        self.ran.append(
            Ran(sandbox_id, request.command, request.cwd, merged, request.timeout_seconds)
        )

    def _running(self, sandbox_id: str) -> FakeSandbox:
        self.sandbox(sandbox_id)
        box = self.booted[sandbox_id]
        if box.info.state != "running":
            raise ContainerGone("The sandbox is not running.")
        if box.info.paused:
            raise ContainerPaused("The sandbox is paused; resume it first.")
        return box

    # Files --------------------------------------------------------------------------------

    def read_path(
        self, sandbox_id: str, path: str, *, max_bytes: int = DEFAULT_MAX_FILE_BYTES
    ) -> FileContent | DirectoryListing:
        """As the client."""
        box = self._running(sandbox_id)
        stat = self._found(box, path)
        if not stat.is_dir:
            if stat.size > max_bytes:
                raise FileTooLarge(f"{path} is larger than {max_bytes} bytes.")
            return FileContent(stat, box.files[path])
        entries = [
            DirectoryEntry(
                posixpath.basename(name), name in box.directories, len(box.files.get(name, b"")),
                0o755 if name in box.directories else 0o644, stat.modified_at,
            )
            for name in sorted({*box.files, *box.directories} - {"/"})
            if posixpath.dirname(name) == path.rstrip("/")
        ]  # fmt: skip
        return DirectoryListing(stat, tuple(entries))

    def write_file(
        self,
        sandbox_id: str,
        path: str,
        content: bytes | Iterable[bytes],
        *,
        mode: int | None = None,
    ) -> int:
        """As the client."""
        box = self._running(sandbox_id)
        if path in box.directories:
            raise FileConflict(f"{path} is a directory.")
        data = content if isinstance(content, bytes) else b"".join(content)
        self._make_parents(box, path)
        box.files[path] = data
        self.modes[sandbox_id, path] = mode
        return len(data)

    def delete_path(self, sandbox_id: str, path: str) -> None:
        """As the client."""
        box = self._running(sandbox_id)
        self._found(box, path)
        inside = f"{path.rstrip('/')}/"
        box.files = {n: c for n, c in box.files.items() if n != path and not n.startswith(inside)}
        box.directories = {n for n in box.directories if n != path and not n.startswith(inside)}

    def mkdir(self, sandbox_id: str, path: str, *, parents: bool = True) -> None:
        """As the client."""
        box = self._running(sandbox_id)
        if path in box.files or (path in box.directories and not parents):
            raise FileConflict(f"{path} already exists.")
        if not parents and posixpath.dirname(path) not in box.directories:
            raise NotFound(f"{posixpath.dirname(path)} does not exist.")
        self._make_parents(box, path)
        box.directories.add(path)

    def move(self, sandbox_id: str, source: str, destination: str) -> None:
        """As the client, for files."""
        box = self._running(sandbox_id)
        if source not in box.files:
            raise NotFound(f"{source} does not exist.")
        box.files[destination] = box.files.pop(source)

    def stat(self, sandbox_id: str, path: str) -> FileStat:
        """As the client."""
        box = self._running(sandbox_id)
        try:
            return self._found(box, path)
        except NotFound:
            return FileStat(path, exists=False)

    def _found(self, box: FakeSandbox, path: str) -> FileStat:
        modified = box.info.started_at
        if path in box.directories:
            return FileStat(
                path, exists=True, is_dir=True, size=4096, mode=0o755, modified_at=modified
            )
        if path in box.files:
            size = len(box.files[path])
            return FileStat(path, exists=True, size=size, mode=0o644, modified_at=modified)
        raise NotFound(f"{path} does not exist.")

    def _make_parents(self, box: FakeSandbox, path: str) -> None:
        while (path := posixpath.dirname(path)) not in box.directories:
            box.directories.add(path)

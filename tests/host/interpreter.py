"""The code interpreter as the tests of the host use it: an image with ipykernel, and runs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from hostruntime.wire.builds import StartBuild
from hostruntime.wire.interpreter import CodeError, CodeFrame, CodeResult, RunCode
from tests.host.agent import Agent
from tests.host.client import HostClient
from tests.kernels import IPYKERNEL, JAVASCRIPT


def build_kernels(agent: Agent) -> str:
    """Make an image that has ipykernel, matplotlib, and the kernel for JavaScript; its name."""
    name = f"img_kernels{time.time_ns():x}"
    recipe = (f"{IPYKERNEL} matplotlib", *JAVASCRIPT)
    options: dict[str, Any] = {"base_image": "python-3.12-bare", "network": "restricted"}
    agent.client.start_build(StartBuild(name, recipe=recipe, disk_mb=2048, **options))
    *_, last = agent.client.build_events(name)
    assert last.kind == "published", last
    return name


@dataclass
class Ran:
    """What came of a run."""

    first: CodeFrame
    last: CodeFrame
    printed: dict[str, str] = field(default_factory=lambda: {"stdout": "", "stderr": ""})
    results: list[CodeResult] = field(default_factory=list)
    error: CodeError | None = None

    @property
    def value(self) -> str | None:
        """The text of the last result."""
        return self.results[-1].text if self.results else None


def collect(frames: Sequence[CodeFrame]) -> Ran:
    ran = Ran(frames[0], frames[-1])
    assert (ran.first.kind, ran.last.kind) == ("started", "done")
    for frame in frames[1:-1]:
        if frame.kind == "stream":
            ran.printed[frame.stream] += frame.text
        elif frame.result is not None:
            ran.results.append(frame.result)
        else:
            ran.error = frame.error
    return ran


def run(
    host: HostClient, sandbox_id: str, code: str, context: str | None = None, **more: Any
) -> Ran:
    """Run code; what came of it."""
    request = RunCode(code, context_id=context, **more)
    return collect(list(host.code_frames(sandbox_id, request)))

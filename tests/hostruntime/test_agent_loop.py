"""Which event loop the agent runs on."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from hostruntime.agent import __main__ as agent


def test_the_agent_runs_on_the_event_loop_in_c(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python's own takes a tenth more of all the agent's time for a sandbox, made and deleted."""
    loops = []

    async def serve(*_: object) -> None:
        loops.append(type(asyncio.get_running_loop()).__module__)

    monkeypatch.setattr(agent, "_serve", serve)
    assert agent.main(["--state-dir", str(tmp_path / "state")]) == 0
    assert loops == ["uvloop"]

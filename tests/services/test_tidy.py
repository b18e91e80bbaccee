"""The passes of every minute: what one of them raises keeps no other from its turn."""

from __future__ import annotations

from functools import partial

import pytest

from hostruntime.errors import HostUnavailable
from sandboxes_app import tasks

AGREE = "orkestr_console.installation.services.agree"
PASSES = {
    "expire_due": "sandboxes_app.services.lifecycle.expire_overdue",
    "note_image_bytes": "sandboxes_app.tasks.note_image_bytes",
    "settle_all": "sandboxes_app.services.settling.settle_all",
    "collect": "sandboxes_app.services.metering.collect",
}


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which passes have come to their turn."""
    done: list[str] = []
    monkeypatch.setattr(AGREE, lambda _: True)
    for name, place in PASSES.items():
        monkeypatch.setattr(place, partial(done.append, name))
    return done


@pytest.mark.parametrize("raised", [ZeroDivisionError("a defect"), HostUnavailable("it is away")])
@pytest.mark.parametrize("bad", PASSES)
def test_each_pass_stands_alone(
    bad: str, raised: Exception, done: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise raised

    monkeypatch.setattr(PASSES[bad], fail)
    tasks.tidy()
    assert done == [one for one in PASSES if one != bad]


def test_nothing_is_settled_by_rows_of_another_state(
    done: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(AGREE, lambda _: False)
    tasks.tidy()
    assert done == []

"""What a sandbox has used, on its page."""

from __future__ import annotations

from django.test import Client
from django.utils import timezone

from hostruntime.wire.sandboxes import MetricsPoint
from orkestr_console.ui.lines import area
from sandboxes_app.models import Sandbox
from sandboxes_app.services import Metrics
from sandboxes_app.use import describe_use
from tests.console.markup import tight
from tests.fakes.host import FakeHost

HTMX = {"HX-Request": "true"}
GOOD = {"template": "debian-12", "size": "small", "network": "off", "timeout_seconds": "600"}


def test_an_area_has_gaps_and_stays_in_its_box() -> None:
    periods = [(0.0, 10.0, 1.0), (50.0, 90.0, 9.0), (90.0, 200.0, 0.0)]
    assert (
        area(periods, 0.0, 100.0, 2.0)
        == "M0 100V50H100V100ZM500 100V0H900V100ZM900 100V100H1000V100Z"
    )
    assert area(periods, 0.0, 0.0, 2.0) == ""
    assert area([], 0.0, 1.0, 2.0) == ""


def test_one_that_ended_is_shown_without_figures_of_now() -> None:
    sandbox = Sandbox(cpu=2, memory_mb=1024, status="terminated")
    points = [MetricsPoint(at, 30.0, 30.0, 512 * 2**20, 7, 1, 2) for at in (1000.0, 9000.0)]
    use = describe_use(Metrics(sandbox, timezone.now(), None, 0.0, points))
    assert use is not None
    assert [figure.words for figure in use.figures] == ["", ""]
    assert use.figures[0].area == use.figures[1].area
    assert use.figures[0].area.count("M") == 2
    assert (use.since, use.disk, use.sent) == (970.0, 7, None)
    assert describe_use(Metrics(sandbox, timezone.now(), None, 0.0)) is None


def test_a_sandboxes_page_has_its_use(console: Client, host: FakeHost) -> None:
    console.post("/sandboxes/new/", GOOD)
    address = f"/sandboxes/{Sandbox.objects.get().pk}/"
    assert f'hx-get="{address}use/"' in tight(console.get(address))
    card = tight(console.get(f"{address}use/", headers=HTMX)).replace("\u202f", " ")
    for part in ("0.50 of 1 CPUs", "100 MB of 1.07 GB", "2.00 MB on disk", "3.00 kB sent"):
        assert part in card
    assert "<html" not in card
    assert "use-area" in tight(console.get(f"{address}use/"))
    host.down = True
    assert "use-area" not in tight(console.get(f"{address}use/", headers=HTMX))

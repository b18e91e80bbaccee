"""Terminal sequences, invisible characters and turned text: in names, in output, and on pages."""

from __future__ import annotations

import re
import sys
import time
import unicodedata
from collections.abc import Callable
from typing import Any

import pytest
from django.test import Client
from hypothesis import given
from hypothesis import strategies as st

from hostruntime.wire.commands import ExecResult
from orkestr_console.accounts import services as accounts
from orkestr_console.accounts.actor import READ
from orkestr_console.accounts.limits import KINDS
from orkestr_console.accounts.models import ApiToken, AuditEntry, Invitation, Plan, Team, User
from orkestr_console.core.errors import InvalidInput
from orkestr_console.core.text import INVISIBLE, escape_invisible, name_problem
from orkestr_console.ui.ansi import MAX_SHOWN_CHARS, Log, render_tail
from sandboxes_app.models import Sandbox
from templates_app.models import Template, TemplateStatus
from tests.api.asking import post, refusal
from tests.fakes.host import FakeHost

# Controls, what cannot be seen, and what turns text: each makes a name look like another.
STEERS = {
    "an escape": "\x1b[31m",
    "a line feed": "\n",
    "a tab": "\t",
    "a delete": "\x7f",
    "a C1 control sequence": "\x9b31m",
    "a right-to-left override": "\u202e",
    "an isolate": "\u2066",
    "a right-to-left mark": "\u200f",
    "a zero-width space": "\u200b",
    "a byte-order mark": "\ufeff",
    "a soft hyphen": "\u00ad",
    "a line separator": "\u2028",
    "a filler": "\u3164",
    "a tag": "\U000e0041",
    "a joiner between Latin letters": "\u200d",
}
GOOD = (
    "caf\u00e9",
    "\u05e9\u05dc\u05d5\u05dd",
    "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 family",
    "\u2764\ufe0f",
    "\u65e5\u672c\u8a9e",
)


def test_every_control_and_format_character_of_unicode_is_known() -> None:
    """But tab and line feed, the joiners, and signs that are there to be seen (Prepended_…)."""
    shown = {*"\t\n\u200c\u200d\u06dd\u070f\u08e2\u0890\u0891", *map(chr, range(0x600, 0x606))}
    shown |= {"\U000110bd", "\U000110cd", *map(chr, range(0x13430, 0x13440))}
    missed = [
        f"U+{number:04X}"
        for number in range(sys.maxunicode + 1)
        if unicodedata.category(char := chr(number)) in {"Cc", "Cf", "Zl", "Zp"}
        if char not in shown and not INVISIBLE.search(char)
    ]
    assert missed == []


@pytest.mark.parametrize("name", GOOD)
def test_what_people_write_is_a_name(name: str) -> None:
    assert name_problem(name) is None
    assert escape_invisible(name) == name


def test_what_is_wrong_with_a_name_is_said() -> None:
    said = name_problem("ab\u202ec")
    assert said
    assert "take out U+202E, character 3" in said


@given(st.text())
def test_nothing_steers_once_it_is_visible(text: str) -> None:
    assert not INVISIBLE.search(escape_invisible(text))


# Names --------------------------------------------------------------------------------------------

type Name = Callable[[Client, str], Any]


def account(console: Client, name: str) -> Any:
    return console.post("/account/name/", {"name": name})


def token(console: Client, name: str) -> Any:
    return console.post("/team/tokens/", {"name": name, "scopes": READ, "days": "1"})


def template(console: Client, name: str) -> Any:
    form = {"name": name, "base_template": "debian-12", "recipe": "true", "network": "restricted"}
    return console.post("/templates/new/", form)


def operators_team(console: Client, name: str) -> Any:
    User.objects.update(is_staff=True)
    return console.post("/operator/teams/new/", {"name": name, "plan": "pro"})


def plan(console: Client, name: str) -> Any:
    User.objects.update(is_staff=True)
    numbers = dict.fromkeys(KINDS, "10")
    return console.post("/operator/plans/pro/", {"name": name, "sizes": "small", **numbers})


def joining(console: Client, name: str) -> Any:
    link = console.post("/team/people/", {"role": "member"}).context["link"]
    who = {"name": name, "email": "eve@example.org", "password": "another long passphrase"}
    return Client().post(link.partition("testserver")[2], who)


NAMES: tuple[Name, ...] = (account, token, template, operators_team, plan, joining)


def all_names() -> str:
    rows = [*Template.objects.all(), *Team.objects.all(), *Plan.objects.all()]
    rows += [*ApiToken.objects.all(), *User.objects.all()]
    return "|".join(row.name for row in rows)


@pytest.mark.parametrize("kind", NAMES, ids=lambda kind: kind.__name__)
def test_a_name_is_what_it_looks_like(console: Client, kind: Name) -> None:
    for steers in STEERS.values():
        answer = kind(console, f"pay{steers}roll")
        assert answer.status_code == 400, steers
        assert "take out U+" in answer.content.decode(), steers
        assert steers not in all_names()
    good = " ".join(GOOD)
    assert kind(console, good).status_code in {200, 302}
    assert good in all_names()


@pytest.mark.parametrize("steers", STEERS.values(), ids=STEERS)
def test_rest_and_the_shell_refuse_the_same(api: Client, team: Team, steers: str) -> None:
    body = {"name": f"pay{steers}roll", "base_template": "debian-12", "recipe": ["true"]}
    said = refusal(post(api, "/v1/templates", body), 400, "invalid_request")
    assert said["detail"].startswith("name: must not contain control")
    with pytest.raises(InvalidInput, match="must not contain control"):
        accounts.mint_token(team, f"pay{steers}roll", [READ])


@pytest.mark.parametrize("hidden", ["\u200b", "\u00ad", "\u2060", "\u202e"])
def test_no_two_addresses_look_the_same(console: Client, hidden: str) -> None:
    """IDNA drops what cannot be seen, and Django takes an address by what IDNA makes of it."""
    form = {"role": "member", "email": f"bob@exam{hidden}ple.org"}
    answer = console.post("/team/people/", form)
    assert answer.status_code == 400
    assert not Invitation.objects.exists()


@pytest.mark.parametrize("path", ["/operator/teams/{}/", "/operator/plans/pro/"])
def test_an_operators_form_refuses_nul(console: Client, team: Team, path: str) -> None:
    User.objects.update(is_staff=True)
    form = {**dict.fromkeys(KINDS, "1"), "plan": "team", "note": "a\0b", "name": "a\0b"}
    assert console.post(path.format(team.pk), form).status_code == 400


# What is no name is shown with marks --------------------------------------------------------------

TROJAN = "/*\u202e } \u2066if (isAdmin)\u2069 \u2066 begin */\u200b"


def marked(page: str) -> str:
    """The page, which has the text with each character that steers it written out."""
    whole = re.sub(r'<span class="ctl">(U\+[0-9A-F]{4,6})</span>', "\u27e8\\1\u27e9", page)
    assert escape_invisible(TROJAN) in whole, "it is not on the page: no proof"
    assert not re.search("[\u200b\u202a-\u202e\u2066-\u2069]", page)
    return whole


def test_no_source_is_turned_on_any_page(
    console: Client, api: Client, host: FakeHost, team: Team, sandbox: Sandbox
) -> None:
    """Trojan Source, CVE-2021-42574: a recipe, output, labels, an error, a browser, the log."""
    body = {"name": "t", "base_template": "debian-12", "recipe": [TROJAN]}
    made = post(api, "/v1/templates", body).json()["id"]
    assert Template.objects.get(pk=made).recipe == [TROJAN]
    marked(console.get(f"/templates/{made}/").content.decode())
    Template.objects.update(status=TemplateStatus.FAILED, error_message=f"{TROJAN}\n{TROJAN}")
    page = console.get(f"/templates/{made}/").content.decode()
    assert marked(page).count(escape_invisible(TROJAN)) >= 3
    # What a form cannot show it does not take over unseen.
    again = console.get(f"/templates/new/?from={made}").content.decode()
    assert "isAdmin" not in again and "left out" in again
    Sandbox.objects.update(metadata={TROJAN: TROJAN}, error_message=TROJAN)
    marked(console.get(f"/sandboxes/{sandbox.pk}/").content.decode())
    row = re.sub(r'data-text="[^"]*"', "", console.get("/sandboxes/").content.decode())
    marked(row)
    host.answers[TROJAN] = ExecResult(0, None, TROJAN.encode(), TROJAN.encode(), 3)
    ran = console.post(f"/sandboxes/{sandbox.pk}/exec/", {"command": TROJAN}).content.decode()
    assert marked(ran).count(escape_invisible(TROJAN)) == 3 + 3
    AuditEntry.objects.create(
        team_id=team.pk,
        who=TROJAN,
        action="x",
        outcome="denied",
        detail=TROJAN,
        object_name=TROJAN,
        data={"x": TROJAN},
    )
    log = marked(console.get("/team/audit/").content.decode())
    assert log.count(escape_invisible(TROJAN)) == 4


# Output -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b]8;;javascript:alert(1)\x1b\\click\x1b]8;;\x1b\\", "click"),
        ("\x1b]52;c;cm0gLXJmIH4=\x07after", "after"),
        ("\x1b]0;title\x07\x1b]50;?\x07after", "after"),
        ("a\x1b[2J\x1b[1;1H\x1b[10Ab\x1b[999999999Cc", "abc"),
        ("\x1b[999999999999999999999999mx", "x"),
        ("\x1b[38;5;99999mx\x1b[38;2;999;999;999my", "xy"),
        ("\x1b[38;5mx", "x"),
        ("\x1bP1$r0m\x1b\\x\x1b_app\x07y\x1b^pm\x1b\\z", "xyz"),
        ("\x1b[6n\x1b[c\x1b[0cx", "x"),
        ("\x9b31mx\x9d0;t\x9c", "31mx0;t"),
        ("\x00\x01\x0e\x0f\x05x", "x"),
        ("x\x1b]unterminated <b>", "x"),
        ("x\x1b[31", "x"),
        ("good\rEVIL", "EVIL"),
        ("a\u2028b\u2029c", "aU+2028bU+2029c"),
        ("\U000e0041x", "U+E0041x"),
    ],
)
def test_of_a_sequence_only_colour_is_left(text: str, shown: str) -> None:
    lines, tail = Log().feed(text)
    html = "".join(lines) + tail
    assert re.sub(r"<[^>]*>", "", html) == shown
    assert set(re.findall(r"<(\w+)", html)) <= {"span"}
    assert "href" not in html and "style" not in html


UNITS = (
    *("\x1b[1K", "\b\x1b[1K", "x\x1b[1K", "\x1b[2K", "\x1b[K", "\r\x1b[1K", "a\b", "\r"),
    *("\x1b]", "\x1b]0;", "\x1b[", "\x1b[1;", "\x1bP", "\x1b[31m", "\x1b[7mx", "\u202e", "&"),
    *(
        "\x1b[;;;;;;;;;;;;;;;;m",
        "\x1b \x1b",
        "\r\r\r\r\r",
        "x\r",
        "\x9b",
        "\x1b[38;5;1;48;2;1;1;1m",
    ),
)


@pytest.mark.parametrize("unit", UNITS, ids=repr)
def test_the_work_grows_with_the_text_and_no_faster(unit: str) -> None:
    """The pieces a blow-up could be made of, after an empty and after a long unfinished line.

    Microseconds a character: what is honest takes one or two, an erasure that is paid for anew
    each time took twenty, and whatever is quadratic far more.
    """
    for start in ("", "x" * 16_000):
        text = start + unit * (60_000 // len(unit))
        assert min(spent(text) for _ in range(2)) < 0.05 + len(text) * MICROSECONDS


MICROSECONDS = 8e-6


def spent(text: str) -> float:
    begun = time.process_time()
    render_tail(text)
    return time.process_time() - begun


@given(st.lists(st.sampled_from([*UNITS, "text", "\n", "x" * 500]), max_size=400))
def test_any_mixture_is_drawn_in_time(units: list[str]) -> None:
    text = "".join(units)
    assert spent(text) < 0.1 + len(text) * MICROSECONDS


def test_a_page_draws_the_end_of_a_flood(console: Client, sandbox: Sandbox, host: FakeHost) -> None:
    flood = b"".join(b"line %d\n" % n for n in range(600_000))
    assert len(flood) > 4 * MAX_SHOWN_CHARS
    host.answers["flood"] = ExecResult(0, None, flood, b"", 3)
    begun = time.process_time()
    answer = console.post(f"/sandboxes/{sandbox.pk}/exec/", {"command": "flood"})
    assert time.process_time() - begun < 5
    page = answer.content.decode()
    assert "598000 earlier lines are not shown" in page
    assert "line 599999\n" in page and "line 597999\n" not in page
    assert len(page) < MAX_SHOWN_CHARS

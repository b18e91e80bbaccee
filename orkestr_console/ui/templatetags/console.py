"""Template tags and filters for ids, sizes, times and icons."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta

from django import template
from django.templatetags.static import static
from django.utils import timezone
from django.utils.html import format_html, format_html_join
from django.utils.safestring import SafeString

from hostruntime.wire.health import EgressHost
from orkestr_console.accounts.limits import LimitKind
from orkestr_console.core import text as texts
from orkestr_console.core.text import escape_invisible
from orkestr_console.ui.ansi import render_tail

register = template.Library()

BROWSERS = (
    ("Edg", "Edge"),
    ("OPR/", "Opera"),
    ("Firefox/", "Firefox"),
    ("FxiOS/", "Firefox"),
    ("Chrome/", "Chrome"),
    ("CriOS/", "Chrome"),
    ("Safari/", "Safari"),
)
SYSTEMS = (
    ("Android", "Android"),
    ("iPhone", "iPhone"),
    ("iPad", "iPad"),
    ("Windows", "Windows"),
    ("Mac OS X", "macOS"),
    ("CrOS", "ChromeOS"),
    ("Linux", "Linux"),
)
# The icons of finished steps.
MARKS = {"succeeded": "check", "cached": "check", "failed": "cross", "skipped": "minus"}
UNITS = ("B", "kB", "MB", "GB", "TB")


@register.filter
def short_id(value: str) -> str:
    """The kind and the last six digits, which differ even for ids created together."""
    kind, _, ulid = value.partition("_")
    return f"{kind}_…{ulid[-6:]}" if len(ulid) > 12 else value


@register.filter
def browser(user_agent: str) -> str:
    """``Firefox on Linux``, to tell one's browsers apart; else the raw user agent.

    Each browser also claims to be its ancestors (RFC 9110, 10.1.5): the most specific comes first.
    """
    name = next((name for mark, name in BROWSERS if mark in user_agent), "")
    system = next((name for mark, name in SYSTEMS if mark in user_agent), "")
    if not name:
        return user_agent[:60] or "unknown"
    return f"{name} on {system}" if system else name


@register.filter
def size(value: int | None) -> str:
    """Bytes in decimal units: ``1.24 GB``."""
    if value is None:
        return ""
    number = float(value)
    for unit in UNITS:
        if number < 999.5 or unit == UNITS[-1]:
            break
        number /= 1000
    digits = 0 if unit == "B" or number >= 99.5 else 1 if number >= 9.95 else 2
    return f"{number:.{digits}f}\u202f{unit}"


@register.filter
def change(value: int | None) -> str:
    """A change in size: ``+1.24 GB``, ``−3 kB``."""
    if value is None:
        return ""
    return f"{'−' if value < 0 else '+'}{size(abs(value))}"


@register.filter
def entry(mapping: Mapping[str, object], key: str) -> object:
    """A mapping's value for ``key``, or None."""
    return mapping.get(key)


@register.filter
def unlocalized(value: float) -> str:
    """A number for a machine to read."""
    return f"{value:g}"


@register.filter
def duration(milliseconds: float | None) -> str:
    """``38 ms``, ``4.2 s``, ``3 min 12 s``."""
    if milliseconds is None:
        return ""
    if milliseconds < 1000:
        return f"{round(milliseconds)}\u202fms"
    seconds = milliseconds / 1000
    if seconds < 59.95:
        return f"{seconds:.1f}\u202fs"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}\u202fmin {rest}\u202fs"
    return f"{minutes // 60}\u202fh {minutes % 60}\u202fmin"


@register.filter
def seconds(value: int) -> str:
    """A duration in words: ``10 minutes``."""
    for length, word in ((86400, "day"), (3600, "hour"), (60, "minute"), (1, "second")):
        if value % length == 0:
            count = value // length
            return f"{count} {word}{'' if count == 1 else 's'}"
    return f"{value} seconds"


@register.filter
def ansi(text: str) -> SafeString:
    """A program's coloured output; only its end, if it is long."""
    shown = render_tail(text)
    if not shown.hidden:
        return shown.lines + shown.tail
    note = format_html('<span class="ctl">{} earlier lines are not shown</span>\n', shown.hidden)
    return note + shown.lines + shown.tail


@register.filter(name="visible")
def visible_text(value: object) -> str | list[str]:
    """Untrusted text with invisible and text-direction characters as code points.

    For a list, each member: use it before ``join``, which escapes.
    """
    return (
        [escape_invisible(str(one)) for one in value]
        if isinstance(value, list)
        else escape_invisible(str(value))
    )


@register.filter
def few(names: list[str]) -> str:
    """The first names and the number of the rest, as :func:`visible_text`."""
    return texts.shorten_list([escape_invisible(name) for name in names])


@register.filter
def first_line(text: str) -> str:
    """The first line of an error message."""
    return text.partition("\n")[0]


@register.filter
def other_lines(text: str) -> str:
    """The lines after the first: the output's tail."""
    return text.partition("\n")[2].strip("\n")


@register.filter
def backticks(text: str) -> SafeString:
    """Text in which words between backticks become code elements."""
    parts = [
        format_html("<code>{}</code>", part) if number % 2 else part
        for number, part in enumerate(text.split("`"))
    ]
    return format_html_join("", "{}", ((part,) for part in parts))


@register.filter
def marked(parts: list[str], secret: str) -> SafeString:
    """The text around a secret, joined by it, with the secret marked."""
    return format_html_join(format_html("<mark>{}</mark>", secret), "{}", ((p,) for p in parts))


@register.filter
def grouped(value: int | None) -> str:
    """``12,345``."""
    return "" if value is None else f"{value:,}"


@register.filter
def pretty(value: object) -> str:
    """Indented JSON."""
    return json.dumps(value, indent=2, ensure_ascii=False)


@register.filter
def amount(value: int, kind: LimitKind) -> str:
    """A limit's number with its unit: ``10 minutes``, ``20,000 MB``, ``3``."""
    if kind.unit == "s":
        return seconds(value)
    return f"{grouped(value)} {kind.unit}".rstrip()


def in_words(length: timedelta) -> str:
    """``5 min``: the largest unit that fits."""
    total = max(int(length.total_seconds()), 0)
    for unit, word in ((86400, "d"), (3600, "h"), (60, "min")):
        if total >= unit:
            return f"{total // unit}\u202f{word}"
    return f"{total}\u202fs"


@register.simple_tag
def moment(at: datetime | None) -> SafeString | str:
    """A time relative to now; the page keeps it current, its title is the exact time."""
    if at is None:
        return ""
    away = timezone.now() - at
    ahead = away < timedelta(0)
    near = abs(away) < timedelta(seconds=5)
    words = "now" if near else f"in {in_words(-away)}" if ahead else f"{in_words(away)} ago"
    exact = at.astimezone(timezone.get_current_timezone())
    return format_html(
        '<time datetime="{}" title="{}" data-relative>{}</time>',
        exact.isoformat(timespec="seconds"),
        exact.strftime("%-d %B %Y, %H:%M:%S %Z"),
        words,
    )


@register.simple_tag
def icon(name: str) -> SafeString:
    """One of the symbols of ``static/img/icons.svg``; decorative, so not read aloud."""
    return format_html(
        '<svg class="icon" aria-hidden="true"><use href="{}#{}"></use></svg>',
        static("img/icons.svg"),
        name,
    )


@register.inclusion_tag("console/_copy.html")
def copy(text: str, label: str) -> dict[str, str]:
    """A button that copies ``text``; ``label`` is for screen readers."""
    return {"text": text, "label": label}


@register.inclusion_tag("console/_copy.html")
def copy_from(element: str, label: str) -> dict[str, str]:
    """The same for the text of an element of the page."""
    return {"source": element, "label": label}


@register.inclusion_tag("console/_badge.html")
def badge(state: object, element: str = "", label: str = "") -> dict[str, object]:
    """A status as a dot and a word; ``state`` has ``tone``, ``label`` and ``value``."""
    return {"state": state, "id": element, "label": label}


@register.simple_tag
def moment_of(at: float) -> SafeString | str:
    """A Unix time as :func:`moment` shows it."""
    return moment(datetime.fromtimestamp(at, UTC))


@register.inclusion_tag("console/_network.html")
def network(mode: str) -> dict[str, str]:
    """A network mode with its icon."""
    icons = {"off": "off", "restricted": "shield", "open": "globe"}
    return {"mode": mode, "icon_name": icons.get(mode, "globe")}


@register.simple_tag
def mark(status: str, waiting: str | int) -> SafeString:
    """The round mark of a build's step or phase, with ``waiting`` in it until that starts."""
    inside: object = waiting
    if status == "running":
        inside = format_html('<span class="{}" aria-hidden="true"></span>', "spin")
    elif status in MARKS:
        inside = icon(MARKS[status])
    return format_html('<span class="mark" data-state="{}">{}</span>', status, inside)


@register.inclusion_tag("console/_badge.html")
def verdict(use: EgressHost) -> dict[str, object]:
    """The network policy's verdict on a sandbox's host, as a badge."""
    if use.refused:
        return {"state": {"tone": "bad", "label": "Refused", "value": "refused"}}
    if use.unreached:
        return {"state": {"tone": "busy", "label": "Not reached", "value": "unreached"}}
    return {"state": {"tone": "good", "label": "Allowed", "value": "allowed"}}


@register.filter
def requests(use: EgressHost) -> str:
    """A sandbox's requests to a host: ``12``, or ``2 of 14`` if some were refused."""
    if not use.refused:
        return grouped(use.unreached if use.direct else use.allowed)
    if not use.allowed:
        return grouped(use.refused)
    return f"{grouped(use.refused)} of {grouped(use.refused + use.allowed)}"


@register.inclusion_tag("console/_field_error.html")
def field_error(errors: Mapping[str, str] | str, name: str) -> dict[str, str]:
    """A field's error message, which its ``aria-describedby`` refers to.

    ``errors`` is "" on a page without errors.
    """
    return {"name": name, "error": errors.get(name, "") if isinstance(errors, Mapping) else ""}


@register.inclusion_tag("console/_alert.html")
def alert(
    message: str | None, title: str = "", element: str = "", *, focus: bool = False
) -> dict[str, object]:
    """An error as a banner, or nothing if there is none; ``element`` is the banner's id."""
    return {"message": message, "title": title, "element": element, "focus": focus}


@register.inclusion_tag("console/_alert.html")
def form_error(
    errors: Mapping[str, str] | str, title: str = "", *, summary: str = "", focus: bool = False
) -> dict[str, object]:
    """The error of a form as a whole, under ``title``.

    If only fields have errors: ``summary``, where there is one, and what to do.
    """
    if isinstance(errors, Mapping) and errors.get("form"):
        return alert(errors["form"], title, focus=focus)
    if errors and summary:
        return alert(f"{summary} Fix the highlighted fields and try again.")
    return alert("")


@register.inclusion_tag("console/_crumbs.html")
def crumbs(current: str, *pages: str) -> dict[str, object]:
    """The way to a page; ``pages`` are those above it, each a label and an address."""
    return {"current": current, "pages": list(zip(pages[::2], pages[1::2], strict=True))}


@register.simple_tag
def described(errors: Mapping[str, str] | str, name: str, help_id: str = "") -> SafeString:
    """A field's ARIA attributes: its help, its error, and whether it is invalid."""
    wrong = name in errors if isinstance(errors, Mapping) else False
    ids = " ".join(filter(None, (help_id, f"{name}-error" if wrong else "")))
    by = format_html('aria-describedby="{}"', ids) if ids else format_html("{}", "")
    return format_html('{} aria-invalid="true"', by) if wrong else by

"""How the console writes ids, sizes, times and icons."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta

from django import template
from django.templatetags.static import static
from django.utils import timezone
from django.utils.html import format_html
from django.utils.safestring import SafeString

from orkestr_console.core import text as texts
from orkestr_console.core.text import visible
from orkestr_console.ui.ansi import rendered

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
UNITS = ("B", "kB", "MB", "GB", "TB")


@register.filter
def short_id(value: str) -> str:
    """``tmpl_01JABCDEF…WXYZ``: the kind, and the end, which tells two made together apart."""
    kind, _, ulid = value.partition("_")
    return f"{kind}_…{ulid[-6:]}" if len(ulid) > 12 else value


@register.filter
def browser(user_agent: str) -> str:
    """``Firefox on Linux``, enough to tell one's browsers apart; else what it calls itself.

    Each claims to be its ancestors too (RFC 9110, 10.1.5): the most particular name comes first.
    """
    name = next((name for mark, name in BROWSERS if mark in user_agent), "")
    system = next((name for mark, name in SYSTEMS if mark in user_agent), "")
    if not name:
        return user_agent[:60] or "unknown"
    return f"{name} on {system}" if system else name


@register.filter
def size(value: int | None) -> str:
    """Bytes in decimal units, as disks are sold: ``1.24 GB``."""
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
    """A size by which something changed: ``+1.24 GB``, ``−3 kB``."""
    if value is None:
        return ""
    return f"{'−' if value < 0 else '+'}{size(abs(value))}"


@register.filter
def entry(mapping: Mapping[str, object], key: str) -> object:
    """What a mapping has under ``key``, or None."""
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
    """A length of time in round words: ``10 minutes``."""
    for length, word in ((86400, "day"), (3600, "hour"), (60, "minute"), (1, "second")):
        if value % length == 0:
            count = value // length
            return f"{count} {word}{'' if count == 1 else 's'}"
    return f"{value} seconds"


@register.filter
def ansi(text: str) -> SafeString:
    """A program's output, coloured: the end of it, if it is long."""
    shown = rendered(text)
    if not shown.hidden:
        return shown.lines + shown.tail
    note = format_html('<span class="ctl">{} earlier lines are not shown</span>\n', shown.hidden)
    return note + shown.lines + shown.tail


@register.filter(name="visible")
def visible_text(value: object) -> str | list[str]:
    """What anybody may have written: what would steer the page's text is written as U+202E.

    Of a list each member, so before ``join``, which escapes.
    """
    return [visible(str(one)) for one in value] if isinstance(value, list) else visible(str(value))


@register.filter
def few(names: list[str]) -> str:
    """As many names as anybody reads, as :func:`visible_text` has them."""
    return texts.few([visible(name) for name in names])


@register.filter
def first_line(text: str) -> str:
    """The sentence that an error message begins with."""
    return text.partition("\n")[0]


@register.filter
def other_lines(text: str) -> str:
    """What follows it: the output's tail."""
    return text.partition("\n")[2].strip("\n")


@register.filter
def grouped(value: int | None) -> str:
    """``12,345``."""
    return "" if value is None else f"{value:,}"


@register.filter
def pretty(value: object) -> str:
    """JSON for people to read."""
    return json.dumps(value, indent=2, ensure_ascii=False)


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
    """A button that copies ``text``; ``label`` is what it says to who cannot see it."""
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


@register.inclusion_tag("console/_field_error.html")
def field_error(errors: dict[str, str], name: str) -> dict[str, str]:
    """The sentence at a field, for the field's ``aria-describedby`` to name."""
    return {"name": name, "error": errors.get(name, "")}

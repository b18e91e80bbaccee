"""The live side of the template pages."""

from __future__ import annotations

from collections import deque
from itertools import islice
from urllib.parse import parse_qs

from django.template.loader import render_to_string

from orkestr_console.accounts.actor import Actor
from orkestr_console.ui.ansi import MAX_LINES, MAX_SHOWN_CHARS, Log, count_line_ends, lines_html
from orkestr_console.ui.live import LivePage, Message
from templates_app import pages, services
from templates_app.events import template_group, templates_group
from templates_app.models import Template
from templates_app.services import output

# How much of what the page already has is read again, for its unfinished line and colours.
REPLAY_CHARS = 64 * 1024
# The queue also moves when other teams' builds finish, and this team's pages get no notice of it.
QUEUE_REFRESH_SECONDS = 3.0


class TemplateListPage(LivePage):
    """The list: sent again whenever one of the team's templates changes."""

    def channel_groups(self, actor: Actor) -> list[str]:
        """The team's templates."""
        return [templates_group(actor.team.pk)]

    def changes(self, actor: Actor) -> list[Message]:
        """The rows and the meter."""
        context = pages.list_context(actor, None)
        return self.changed_fragments(
            {"template-list": render_to_string("templates_app/_list.html#list", context)}
        )


class StepLog:
    """Where a page stands in one step's output, to continue from there."""

    def __init__(self, template: Template, step: int, after: int) -> None:
        self._log = Log()
        replayed = output.tail(template, step, REPLAY_CHARS, until=after)
        lines, _ = self._log.feed(replayed.text)
        # The number of the unfinished line.
        self._number = replayed.first + count_line_ends(lines)

    def append(self, step: int, text: str) -> Message:
        """The lines that ``text`` completes, no more than a page shows, and the unfinished one."""
        text, skipped = self._trim(text)
        lines, tail = self._log.feed(text)
        shown = deque(lines, maxlen=MAX_LINES)
        first = self._number + count_line_ends(islice(lines, len(lines) - len(shown)))
        self._number = first + count_line_ends(shown)
        return {
            "step": step,
            "lines": lines_html(list(shown), first),
            # If any are dropped, these lines no longer follow on from those of the page.
            "dropped": skipped + len(lines) - len(shown),
            "tail": tail,
            "next": self._number,
        }

    def _trim(self, text: str) -> tuple[str, int]:
        """The end of a very long text, and how many lines before it are skipped."""
        cut = len(text) - MAX_SHOWN_CHARS
        if cut <= 0:
            return text, 0
        cut = text.find("\n", cut, cut + output.MAX_LINE_LENGTH) + 1 or cut
        skipped = text.count("\n", 0, cut)
        self._number += skipped
        self._log = Log()
        self._log.feed(f"{text[max(cut - output.LEAD, 0) : cut].rstrip()}\n")
        return text[cut:], max(skipped, 1)


class TemplatePage(LivePage):
    """One template: its state, and the output after event ``?after=``."""

    def channel_groups(self, actor: Actor) -> list[str]:
        """The template, if it is the team's."""
        template = services.get_template(actor, self.template_id)
        self._after = self._after_parameter()
        self._logs: dict[int, StepLog] = {}
        self._steps: dict[int, object] = {}
        return [template_group(template.pk)]

    def changes(self, actor: Actor) -> list[Message]:
        """New output first, then the state: a step looks finished only once its output is there."""
        template = services.get_template(actor, self.template_id)
        self.refresh_after = QUEUE_REFRESH_SECONDS if template.is_queued else None
        parts = pages.fragments(template, self.address, self._steps)
        return [*self._output(template), *self.changed_fragments(parts)]

    def _output(self, template: Template) -> list[Message]:
        last = pages.last_event(template)
        events = template.events.filter(kind="output", seq__gt=self._after, seq__lte=last)
        texts: dict[int, list[str]] = {}
        for step, text in pages.output_texts(events):
            texts.setdefault(step, []).append(text)
        if not texts:
            return []
        steps = [self._append(template, step, "".join(parts)) for step, parts in texts.items()]
        self._after = last
        return [{"kind": "append", "steps": steps, "seq": last}]

    def _append(self, template: Template, step: int, text: str) -> Message:
        if step not in self._logs:
            # The page's unfinished line is continued, so the log starts where the page's ends.
            self._logs[step] = StepLog(template, step, self._after)
        return self._logs[step].append(step, text)

    @property
    def template_id(self) -> str:
        """The id in the address."""
        return str(self.scope["url_route"]["kwargs"]["template_id"])

    def _after_parameter(self) -> int:
        """The last event that the page has; 0 if the parameter is not a number."""
        after = parse_qs(self.scope["query_string"].decode("latin-1")).get("after", ["0"])[0]
        return int(after) if after.isascii() and after.isdigit() and len(after) < 10 else 0

"""The live side of the template pages."""

from __future__ import annotations

from collections import deque
from urllib.parse import parse_qs

from django.template.loader import render_to_string

from orkestr_console.accounts.actor import Actor
from orkestr_console.console.ansi import MOST_LINES, Log, lines_html
from orkestr_console.console.live import LivePage, Message
from templates_app import pages, services
from templates_app.events import template_group, templates_group
from templates_app.models import Template


class TemplateListPage(LivePage):
    """The list: sent again when a template of the team changed."""

    def groups_of(self, actor: Actor) -> list[str]:
        """The team's templates."""
        return [templates_group(actor.team.pk)]

    def changes(self, actor: Actor) -> list[Message]:
        """The rows and the meter."""
        context = pages.list_context(actor, None)
        return self.fresh(
            {"template-list": render_to_string("templates_app/_list.html#list", context)}
        )


class TemplatePage(LivePage):
    """One template: its state, and the output that came after ``?after=``."""

    def groups_of(self, actor: Actor) -> list[str]:
        """The template, if it is the team's."""
        template = services.get_template(actor, self.template_id)
        self._after = self._seen()
        self._logs: dict[int, Log] = {}
        return [template_group(template.pk)]

    def changes(self, actor: Actor) -> list[Message]:
        """New output first, then the state: a step is shown as ended once its output is there."""
        template = services.get_template(actor, self.template_id)
        return [*self._output(template), *self.fresh(pages.fragments(template, self.address))]

    def _output(self, template: Template) -> list[Message]:
        last = pages.last_event(template)
        news = template.events.filter(kind="output", seq__gt=self._after, seq__lte=last)
        texts: dict[int, list[str]] = {}
        for step, text in pages.outputs(news):
            texts.setdefault(step, []).append(text)
        if not texts:
            return []
        steps = [self._appended(template, step, "".join(parts)) for step, parts in texts.items()]
        self._after = last
        return [{"kind": "append", "steps": steps, "seq": last}]

    def _appended(self, template: Template, step: int, text: str) -> Message:
        if step not in self._logs:
            # The page's unfinished line is continued, so the log begins where the page's ended.
            self._logs[step] = Log()
            self._logs[step].feed(pages.printed(template, step, self._after))
        lines, tail = self._logs[step].feed(text)
        shown = deque(lines, maxlen=MOST_LINES)
        return {
            "step": step,
            "lines": lines_html(list(shown)),
            "dropped": len(lines) - len(shown),
            "tail": tail,
        }

    @property
    def template_id(self) -> str:
        """The id in the address."""
        return str(self.scope["url_route"]["kwargs"]["template_id"])

    def _seen(self) -> int:
        """The last event that the page has; anything that is no number counts as none."""
        given = parse_qs(self.scope["query_string"].decode("latin-1")).get("after", ["0"])[0]
        return int(given) if given.isascii() and given.isdigit() and len(given) < 10 else 0

"""A build's output in the console: pages, search and downloads."""

from __future__ import annotations

from django.http import HttpRequest, HttpResponse, HttpResponseBase, StreamingHttpResponse
from django.shortcuts import render
from django.views.decorators.http import require_safe

from orkestr_console.core.errors import InvalidInput
from orkestr_console.core.postgres import release_connection
from orkestr_console.core.text import plain
from orkestr_console.http.decorators import ConsoleRequest, console_page
from templates_app import pages, services
from templates_app.services import output

PLAIN = "text/plain; charset=utf-8"
MAX_HITS = 100
# More digits than the largest possible line number has.
MAX_DIGITS = 9


@require_safe
@console_page
def step_output(request: ConsoleRequest, template_id: str, number: int) -> HttpResponse:
    """A step's stored output as text; without colours if ``plain`` is given."""
    template = services.get_template(request.actor, template_id)
    text = output.step_output(template, number)
    return HttpResponse(plain(text) if "plain" in request.GET else text, content_type=PLAIN)


@require_safe
@console_page
def step_lines(request: ConsoleRequest, template_id: str, number: int) -> HttpResponse:
    """The lines around ``at``, of those from ``first`` to ``last`` that the page doesn't have."""
    template = services.get_template(request.actor, template_id)
    gap = pages.Gap(required_number(request, "first"), required_number(request, "last"))
    window = pages.log_window(template, number, gap, required_number(request, "at"))
    context = {"template": template, "number": number, "window": window}
    return render(request, "templates_app/_lines.html", context)


def required_number(request: HttpRequest, name: str) -> int:
    """A line number from the query string. Raises ``InvalidInput``."""
    text = request.GET.get(name, "")
    if not (text.isascii() and text.isdigit() and len(text) <= MAX_DIGITS):
        sentence = "must be the number of a line."
        raise InvalidInput(f"{name}: {sentence}", fields={name: sentence})
    return int(text)


@require_safe
@console_page
def search(request: ConsoleRequest, template_id: str) -> HttpResponse:
    """The lines that contain ``q``: as a fragment for the script, or as a page without it."""
    template = services.get_template(request.actor, template_id)
    query = request.GET.get("q", "")
    too_long = len(query) > output.MAX_QUERY_LENGTH
    result = None
    if query.strip() and not too_long:
        after = (optional_number(request, "step"), optional_number(request, "line"))
        result = output.search(template, query, after=after, limit=MAX_HITS)
    context = {"template": template, "wanted": query, "too_long": too_long, "found": result}
    name = "_search" if request.htmx else "search"
    return render(request, f"templates_app/{name}.html", context)


def optional_number(request: HttpRequest, name: str) -> int:
    """A line number from the query string; 0 if there is none. Raises ``InvalidInput``."""
    return required_number(request, name) if name in request.GET else 0


@require_safe
@console_page
def download_log(request: ConsoleRequest, template_id: str) -> HttpResponseBase:
    """The complete build log as a plain text download."""
    template = services.get_template(request.actor, template_id)
    headers = {
        "Cache-Control": "no-store",
        "Content-Disposition": f'attachment; filename="{template.pk}.log"',
    }
    if request.method == "HEAD":
        return HttpResponse(content_type=PLAIN, headers=headers)
    release_connection()
    return StreamingHttpResponse(services.log_text(template), content_type=PLAIN, headers=headers)

"""The pages that say what is in an image, and how two images differ."""

from __future__ import annotations

from typing import Any

from django.http import HttpResponse
from django.shortcuts import render
from django.views.decorators.http import require_safe

from orkestr_console.accounts.actor import Actor
from orkestr_console.core.errors import Conflict
from orkestr_console.http.decorators import ConsoleRequest, console_page
from templates_app import services
from templates_app.models import Template
from templates_app.services.contents import Contents, compare, contents

# So many can be chosen from, the newest; an older one has a link on its own page.
MOST_CHOICES = 200


@require_safe
@console_page
def template_contents(request: ConsoleRequest, template_id: str) -> HttpResponse:
    """What is in a template's image; why there is nothing to see, if it has none."""
    try:
        found = contents(request.actor, template_id)
    except Conflict as error:
        template = services.get_template(request.actor, template_id)
        context = {"template": template, "refused": error}
        return render(request, "templates_app/contents.html", context, status=error.status)
    manager = request.GET.get("manager", "")
    context = {
        "template": found.template,
        "contents": found,
        "manager": manager,
        "packages": listed(found, manager),
        "others": [other for other in ready(request.actor) if other.pk != template_id],
    }
    return render(request, "templates_app/contents.html", context)


def listed(found: Contents, manager: str) -> list[tuple[str, str, str]]:
    """Manager, name and version of the packages; of one manager, if it is one that has any."""
    chosen = [manager] if manager in found.packages else list(found.packages)
    return [
        (name, package.name, package.version) for name in chosen for package in found.packages[name]
    ]


@require_safe
@console_page
def template_compare(request: ConsoleRequest) -> HttpResponse:
    """How the images ``a`` and ``b`` differ, or the choice of them."""
    asked = {side: request.GET.get(side, "") for side in ("a", "b")}
    context: dict[str, Any] = {**asked, "choices": ready(request.actor)}
    if all(asked.values()):
        try:
            a, b = (contents(request.actor, asked[side]) for side in ("a", "b"))
        except Conflict as error:
            context["refused"] = error
            return render(request, "templates_app/compare.html", context, status=error.status)
        context["difference"] = compare(a, b)
    return render(request, "templates_app/compare.html", context)


def ready(actor: Actor) -> list[Template]:
    """The team's templates that have an image, the newest first."""
    rows = Template.objects.for_team(actor.team).ready().defer("contents", "recipe")
    return list(rows.order_by("-created_at", "-pk")[:MOST_CHOICES])

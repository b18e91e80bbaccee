"""The pages that show what is in an image, and how two images differ."""

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

# The newest ones are offered; an older one has a link on its own page.
MAX_CHOICES = 200


@require_safe
@console_page
def template_contents(request: ConsoleRequest, template_id: str) -> HttpResponse:
    """What is in a template's image, or why it has none."""
    try:
        image_contents = contents(request.actor, template_id)
    except Conflict as error:
        template = services.get_template(request.actor, template_id)
        context = {"template": template, "refused": error}
        return render(request, "templates_app/contents.html", context, status=error.status)
    manager = request.GET.get("manager", "")
    context = {
        "template": image_contents.template,
        "contents": image_contents,
        "manager": manager,
        "packages": package_rows(image_contents, manager),
        "others": [other for other in ready_templates(request.actor) if other.pk != template_id],
    }
    return render(request, "templates_app/contents.html", context)


def package_rows(image_contents: Contents, manager: str) -> list[tuple[str, str, str]]:
    """Manager, name and version of the packages; only one manager's, if it has any."""
    managers = [manager] if manager in image_contents.packages else list(image_contents.packages)
    return [
        (name, package.name, package.version)
        for name in managers
        for package in image_contents.packages[name]
    ]


@require_safe
@console_page
def template_compare(request: ConsoleRequest) -> HttpResponse:
    """How the images ``a`` and ``b`` differ, or the form to choose them."""
    sides = {side: request.GET.get(side, "") for side in ("a", "b")}
    context: dict[str, Any] = {**sides, "choices": ready_templates(request.actor)}
    if all(sides.values()):
        try:
            a, b = (contents(request.actor, sides[side]) for side in ("a", "b"))
        except Conflict as error:
            context["refused"] = error
            return render(request, "templates_app/compare.html", context, status=error.status)
        context["difference"] = compare(a, b)
    return render(request, "templates_app/compare.html", context)


def ready_templates(actor: Actor) -> list[Template]:
    """The team's templates that have an image, newest first."""
    rows = Template.objects.for_team(actor.team).ready().defer("contents", "recipe")
    return list(rows.order_by("-created_at", "-pk")[:MAX_CHOICES])

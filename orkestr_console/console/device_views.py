"""The page on which a signed-in person lets a program have a token, or refuses (RFC 8628, 3.3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from django.http import HttpResponse, QueryDict
from django.shortcuts import render
from django.views.decorators.cache import never_cache
from django.views.decorators.http import require_http_methods

from orkestr_console.accounts import device_login
from orkestr_console.accounts.device_login import DeviceApprovalSpec
from orkestr_console.accounts.limits import envelope
from orkestr_console.accounts.models import Role
from orkestr_console.core.errors import DomainError, InvalidInput
from orkestr_console.http.decorators import ConsoleRequest, console_page
from orkestr_console.http.validation import parse_spec
from orkestr_console.ui.forms import Form

ACCESS_WORDS = (
    ("write", "Use", "Build templates, start sandboxes, run commands, delete."),
    ("read", "Look", "List and read templates and sandboxes."),
    ("everything", "Everything", "Full access, including future permissions."),
)
DAYS = ("7", "30", "90", "365")


@dataclass
class DeviceForm(Form):
    """The code, and what the token may do for how long."""

    code: str = ""
    access: str = "write"
    days: str = "90"

    labels: ClassVar[dict[str, str]] = {
        "code": "This code",
        "access": "Permissions",
        "days": "The expiry",
    }

    @classmethod
    def from_post(cls, data: QueryDict) -> DeviceForm:
        """A form from posted data."""
        return cls(data.get("code", ""), data.get("access", "write"), data.get("days", "90"))

    def spec(self) -> DeviceApprovalSpec:
        """The validated request. Raises ``InvalidInput``."""
        self.reject_unusable()
        data = {"code": self.code, "access": self.access, "days": self.days or None}
        return parse_spec(DeviceApprovalSpec, data)


@never_cache
@require_http_methods(["GET", "HEAD", "POST"])
@console_page
def device_page(request: ConsoleRequest) -> HttpResponse:
    """Ask for the code, show the login that it belongs to, and take the answer.

    A link may bring the code along, but only the form answers.
    """
    if request.method == "POST" and "answer" in request.POST:
        return answer(request, DeviceForm.from_post(request.POST))
    given = request.POST if request.method == "POST" else request.GET
    form = DeviceForm(given.get("code", "").strip())
    if not form.code and request.method != "POST":
        return show(request, form)
    return show_login(request, form)


def show_login(request: ConsoleRequest, form: DeviceForm, status: int = 200) -> HttpResponse:
    """The page with the login to answer; without it if there is none with this code."""
    try:
        form.reject_unusable()
        login = device_login.find(request.actor, form.code)
    except DomainError as error:
        form.add_error(error)
        return show(request, form, error.status)
    form.code = device_login.normalized(form.code)
    return show(request, form, status, login=login)


def answer(request: ConsoleRequest, form: DeviceForm) -> HttpResponse:
    """Approve, or deny whatever else was sent."""
    try:
        if request.POST["answer"] == "approve":
            require_same_team(request)
            answered = device_login.approve(request.actor, form.spec())
        else:
            form.reject_unusable()
            answered = device_login.deny(request.actor, form.code)
    except DomainError as error:
        form.add_error(error)
        if "code" in form.errors or error.code != "invalid_request":
            return show(request, form, error.status)
        return show_login(request, form, error.status)
    return show(request, form, answered=answered)


def require_same_team(request: ConsoleRequest) -> None:
    """Raise ``InvalidInput`` if the person has switched teams since the page was shown."""
    team = request.actor.team
    if request.POST.get("team", team.pk) != team.pk:
        raise InvalidInput(
            f"You have switched teams since this page was shown: it would be {team.name} now. If "
            "that is right, approve again."
        )


def show(
    request: ConsoleRequest, form: DeviceForm, status: int = 200, **found: Any
) -> HttpResponse:
    """The page."""
    context = {
        "form": form,
        "may_approve": request.actor.is_at_least(Role.ADMIN),
        "admins": envelope(request.actor.team).admins(),
        "access": ACCESS_WORDS,
        "days": DAYS,
        **found,
    }
    return render(request, "console/device.html", context, status=status)

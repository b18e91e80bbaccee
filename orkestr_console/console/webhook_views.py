"""The pages of a team's webhooks: all of them, and one with its deliveries."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from django.contrib import messages
from django.http import HttpResponse, QueryDict
from django.shortcuts import redirect, render
from django.views.decorators.cache import never_cache
from django.views.decorators.http import require_http_methods, require_POST, require_safe

from orkestr_console.core.errors import DomainError, InvalidInput
from orkestr_console.http.decorators import ConsoleRequest, console_page
from orkestr_console.http.validation import parse_spec
from orkestr_console.ui.forms import Form
from orkestr_console.webhooks import services
from orkestr_console.webhooks.models import DeliveryStatus, EventType, Webhook
from orkestr_console.webhooks.specs import WebhookSpec

ALL, SOME = "all", "some"


@dataclass
class WebhookForm(Form):
    """A new webhook. ``which`` is whether it gets all events, or some."""

    url: str = ""
    which: str = ALL
    events: list[str] = field(default_factory=list)

    labels: ClassVar[dict[str, str]] = {"url": "The address", "event_types": "Events"}

    @classmethod
    def from_post(cls, data: QueryDict) -> WebhookForm:
        """A form from posted data."""
        return cls(data.get("url", "").strip(), data.get("which", ""), data.getlist("events"))

    def spec(self) -> WebhookSpec:
        """The validated request. Raises ``InvalidInput``."""
        self.reject_unusable()
        if self.which != SOME:
            return parse_spec(WebhookSpec, {"url": self.url})
        if not self.events:
            problem = "must be chosen: at least one."
            raise InvalidInput(f"event_types {problem}", fields={"event_types": problem})
        return parse_spec(WebhookSpec, {"url": self.url, "event_types": self.events})


@never_cache
@require_http_methods(["GET", "HEAD", "POST"])
@console_page
def webhooks_page(request: ConsoleRequest) -> HttpResponse:
    """All webhooks, and the form for a new one, whose secret is shown once."""
    if request.method != "POST":
        return show(request, WebhookForm())
    form = WebhookForm.from_post(request.POST)
    try:
        webhook, secret = services.create_webhook(request.actor, form.spec())
    except DomainError as error:
        form.add_error(error)
        return show(request, form, error.status)
    return show(request, WebhookForm(), made=webhook, secret=secret)


def show(
    request: ConsoleRequest, form: WebhookForm, status: int = 200, **made: Any
) -> HttpResponse:
    """The page."""
    context = {
        "form": form,
        "webhooks": services.list_webhooks(request.actor),
        "event_types": EventType.choices,
        **made,
    }
    return render(request, "console/webhooks.html", context, status=status)


@require_safe
@console_page
def webhook_page(request: ConsoleRequest, webhook_id: str) -> HttpResponse:
    """One webhook and its latest deliveries."""
    webhook = services.get_webhook(request.actor, webhook_id)
    return render(request, "console/webhook.html", deliveries_context(request, webhook))


@require_safe
@console_page
def webhook_deliveries(request: ConsoleRequest, webhook_id: str) -> HttpResponse:
    """The deliveries alone, which the page asks for again while any is pending."""
    webhook = services.get_webhook(request.actor, webhook_id)
    if not request.htmx:
        return redirect("console:webhook", webhook.pk)
    context = deliveries_context(request, webhook)
    return render(request, "console/webhook.html#deliveries", context)


def deliveries_context(request: ConsoleRequest, webhook: Webhook) -> dict[str, Any]:
    """What the page and its part show."""
    deliveries = services.list_deliveries(request.actor, webhook.pk)
    pending = any(delivery.status == DeliveryStatus.PENDING for delivery in deliveries)
    return {"webhook": webhook, "deliveries": deliveries, "pending": pending}


@require_POST
@console_page
def webhook_test(request: ConsoleRequest, webhook_id: str) -> HttpResponse:
    """Send a test event."""
    services.send_test(request.actor, webhook_id)
    return redirect("console:webhook", webhook_id)


@require_POST
@console_page
def webhook_enable(request: ConsoleRequest, webhook_id: str) -> HttpResponse:
    """Send events again."""
    services.enable_webhook(request.actor, webhook_id)
    messages.success(request, "Enabled. New events are sent again.")
    return redirect("console:webhook", webhook_id)


@require_http_methods(["GET", "HEAD", "POST"])
@console_page
def webhook_delete(request: ConsoleRequest, webhook_id: str) -> HttpResponse:
    """Ask first, then delete."""
    if request.method != "POST":
        webhook = services.get_webhook(request.actor, webhook_id)
        return render(request, "console/webhook_delete.html", {"webhook": webhook})
    services.delete_webhook(request.actor, webhook_id)
    messages.success(request, "The webhook was deleted.")
    return redirect("console:webhooks")

"""The part of a sandbox's page that leads to its previews."""

from __future__ import annotations

import pytest
from django.test import Client

from sandboxes_app.models import Sandbox
from sandboxes_app.services import preview_token
from tests.console.markup import tight
from tests.fakes.host import FakeHost

HTMX = {"HX-Request": "true"}


@pytest.fixture
def box(console: Client, host: FakeHost) -> Sandbox:
    form = {"template": "debian-12", "size": "small", "network": "restricted"}
    console.post("/sandboxes/new/", {**form, "timeout_seconds": "600"})
    return Sandbox.objects.get()


def test_a_port_leads_to_its_address(console: Client, box: Sandbox) -> None:
    assert 'id="preview"' in tight(console.get(f"/sandboxes/{box.pk}/"))
    shown = console.get(f"/sandboxes/{box.pk}/preview/", {"port": "3000"}, headers=HTMX)
    address = f"http://3000-{box.pk.removeprefix('sbx_').lower()}.localhost:"
    assert f'<a href="{address}' in tight(shown) and "Public" in tight(shown)
    assert "no-store" in shown["Cache-Control"]
    page = tight(console.get(f"/sandboxes/{box.pk}/preview/?port=3000"))
    assert address in page and "<title>" in page


def test_one_that_asks_for_its_token_is_linked_with_it(console: Client, box: Sandbox) -> None:
    Sandbox.objects.update(preview_auth=True)
    shown = tight(console.get(f"/sandboxes/{box.pk}/preview/?port=3000", headers=HTMX))
    assert f"/?ork_preview_token={preview_token(box)}" in shown


def test_what_is_no_port_is_said_in_place(console: Client, box: Sandbox) -> None:
    shown = console.get(f"/sandboxes/{box.pk}/preview/?port=0", headers=HTMX)
    assert shown.status_code == 200
    assert "must be a port number" in tight(shown) and 'aria-invalid="true"' in tight(shown)


def test_a_sandbox_without_previews_shows_none(console: Client, box: Sandbox) -> None:
    Sandbox.objects.update(network="off")
    assert 'id="preview"' not in tight(console.get(f"/sandboxes/{box.pk}/"))
    shown = tight(console.get(f"/sandboxes/{box.pk}/preview/?port=80", headers=HTMX))
    assert "has no previews" in shown

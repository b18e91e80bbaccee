"""The API's reference in the console: all of the document, and nothing from elsewhere."""

from __future__ import annotations

from html import unescape
from typing import Any

import pytest
from django.test import Client

from orkestr_console.openapi.document import document
from orkestr_console.openapi.shown import groups
from tests.console.markup import tight

pytestmark = pytest.mark.django_db

# Bytes of a page, before it is compressed.
HEAVIEST = 400_000
OPERATIONS = [each for methods in document()["paths"].values() for each in methods.values()]


def test_every_call_is_on_the_first_page_and_on_its_groups(console: Client) -> None:
    first = tight(console.get("/reference/"))
    pages = {group.slug: tight(console.get(f"/reference/{group.slug}/")) for group in groups()}
    assert 'href="/v1/openapi.json"' in first
    for operation in OPERATIONS:
        slug = operation["tags"][0].lower()
        assert f'href="/reference/{slug}/#{operation["operationId"]}"' in first
        assert f'id="{operation["operationId"]}"' in pages[slug]
        for sample in operation["x-codeSamples"]:
            assert sample["source"] in unescape(pages[slug])
    for page in (first, *pages.values()):
        assert len(page) < HEAVIEST
        assert "<script>" not in page
        assert " style=" not in page


def test_what_a_call_takes_and_answers_is_shown(console: Client) -> None:
    page = tight(console.get("/reference/sandboxes/"))
    for shown in (
        "<code>timeout_seconds</code>",
        "default 600, at least 10",
        "<code>sandboxes[].preview_auth_token</code>",
        "<code>Idempotency-Key</code>",
        "<code>metadata[…]</code>",
        "<code>sandboxes:write</code>",
        "<code>exec_timeout</code>",
    ):
        assert (shown in page) == (shown != "<code>exec_timeout</code>"), shown
    assert "<code>exec_timeout</code>" in tight(console.get("/reference/commands/"))


def test_there_is_a_way_to_it_and_none_to_what_is_not_there(console: Client) -> None:
    home: Any = console.get("/templates/")
    assert 'href="/reference/"' in home.content.decode()
    assert console.get("/reference/nothing/").status_code == 404

"""What a browser has to fetch for a page: how often, how much of it, and how long it keeps it."""

from __future__ import annotations

import re
from html import unescape
from pathlib import Path
from urllib.parse import urldefrag

import httpx
import pytest
from django.conf import settings
from django.test import Client

from orkestr_console.accounts.models import Team
from orkestr_console.ui import bundles
from tests.serving import Serving
from tests.serving import serving as serving

MOST_REQUESTS = 5
ONE_YEAR = 365 * 24 * 3600
ACCEPTED = {"Accept-Encoding": "gzip, deflate, br"}

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.usefixtures("plans")]


@pytest.fixture
def visitor(serving: Serving, console: Client) -> httpx.Client:
    """Signed in at the real server."""
    name = settings.SESSION_COOKIE_NAME.replace(str(settings.PORT), str(serving.port))
    value = console.cookies[settings.SESSION_COOKIE_NAME].value
    return httpx.Client(
        base_url=serving.url, cookies={name: value}, headers=ACCEPTED, trust_env=False, timeout=20
    )


def parts(page: str) -> set[str]:
    """The files that a page refers to."""
    named = re.findall(r'<(?:script|img)[^>]* src="([^"]+)"', page)
    named += re.findall(r'<link rel="(?:stylesheet|icon)" href="([^"]+)"', page)
    named += re.findall(r'<use href="([^"]+)"', page)
    return {urldefrag(unescape(each)).url for each in named}


@pytest.mark.parametrize(
    "path", ["/sign-in/", "/templates/", "/sandboxes/", "/team/usage/", "/reference/commands/"]
)
def test_a_page_takes_five_requests_and_all_but_one_are_kept_for_good(
    visitor: httpx.Client, path: str
) -> None:
    page = visitor.get(path, follow_redirects=True)
    assert page.status_code == 200
    assert page.headers["Content-Encoding"] == "gzip"
    assert "Accept-Encoding" in page.headers["Vary"]
    fetched = parts(page.text)
    assert "console." in "".join(fetched)
    assert 1 + len(fetched) <= MOST_REQUESTS, fetched
    for address in fetched:
        part = visitor.get(address)
        assert part.status_code == 200, address
        assert part.headers["Content-Encoding"] == "br", address
        assert "immutable" in part.headers["Cache-Control"], address
        kept = re.search(r"max-age=(\d+)", part.headers["Cache-Control"])
        assert kept, address
        assert int(kept[1]) >= ONE_YEAR


def test_whoever_cannot_read_compressed_files_gets_them_as_they_are(visitor: httpx.Client) -> None:
    plain = {"Accept-Encoding": "identity"}
    page = visitor.get("/templates/", headers=plain)
    assert "Content-Encoding" not in page.headers
    for address in parts(page.text):
        part = visitor.get(address, headers=plain)
        assert "Content-Encoding" not in part.headers
        assert part.content == visitor.get(address).content


def test_no_answer_to_a_form_and_no_call_of_the_api_is_compressed(
    serving: Serving, visitor: httpx.Client, key: str, team: Team
) -> None:
    """The one may show a secret, beside what was sent; the others are streams, and small."""
    refused = visitor.post("/sign-in/", data={"username": "x" * 500, "password": "y"})
    assert len(refused.content) > 500
    assert "Content-Encoding" not in refused.headers
    headers = {"Authorization": f"Bearer {key}"}
    assert "Content-Encoding" not in visitor.get("/v1/sandboxes", headers=headers).headers


def write(folder: Path, **modules: str) -> Path:
    (folder / "js").mkdir()
    (folder / "vendor").mkdir()
    for name, source in modules.items():
        (folder / "js" / f"{name}.js").write_text(source)
    return folder


def test_modules_come_after_those_that_they_import_and_keep_their_names(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        console='import { a, b } from "./two.js";\nconst here = a() + b();\n',
        two='import { c } from "./three.js";\nexport function a() {}\nexport async function b() {}',
        three="export function c() {}\n",
        unused="export function d() {}\n",
    )
    bundle = bundles.bundle_scripts(root)
    assert re.findall(r"const (\w+)_js = ", bundle) == ["three", "two", "console"]
    assert "const { a, b } = two_js;" in bundle
    assert "return { a, b };" in bundle
    assert not re.search(r"^(import|export)\b", bundle, re.MULTILINE)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("export const x = 1;\n", "not understood"),
        ('import x from "./two.js";\n', "not understood"),
        ('import { a } from "./console.js";\n', "import each other"),
    ],
)
def test_what_the_bundle_cannot_do_is_said(tmp_path: Path, source: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        bundles.bundle_scripts(write(tmp_path, console=source))

"""What a JSON body may be: every way of being wrong is a clear 4xx and never a 500."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from django.conf import settings
from django.test import Client, override_settings

from tests.api.test_auth import refused


@pytest.fixture(autouse=True)
def things() -> Iterator[None]:
    with override_settings(ROOT_URLCONF="tests.api.test_auth"):
        yield


def post(api: Client, body: bytes, content_type: str = "application/json") -> object:
    # As a header, because the test client declares no type for an empty body.
    headers = {"Content-Type": content_type}
    return api.generic("POST", "/v1/things", body, content_type, headers=headers)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "empty"),
        (b"   ", "empty"),
        (b"{", "line 1, column 2"),
        (b'{"name": "x"} trailing', "Extra data"),
        (b"{'name': 'x'}", "column 2"),
        (b'{"name": "\xff"}', "UTF-8"),
        (b'{"name": NaN}', "NaN"),
        (b'{"name": -Infinity}', "-Infinity"),
        (b'{"name": 1e999}', "too large"),
        (b'{"name": ' + b"9" * 5000 + b"}", "too long"),
        (b'{"name": "a", "name": "b"}', "'name' is given twice"),
        (b'{"name": ' + b"[" * 40 + b"]" * 40 + b"}", "levels deep"),
        (b'{"name": ' + b"[" * 200_000, "levels deep"),
        (b'{"a":' * 5000 + b"1" + b"}" * 5000, "levels deep"),
        (b'\xef\xbb\xbf{"name": "x"}', "BOM"),
    ],
)
def test_a_body_that_is_no_json_is_malformed(api: Client, body: bytes, says: str) -> None:
    assert says in refused(post(api, body), 400, "malformed_json")


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"[]", "must be a JSON object"),
        (b'"x"', "must be a JSON object"),
        (b"null", "must be a JSON object"),
        (b"{}", "name: is required."),
        (b'{"name": 1}', "name: must be a string."),
        (b'{"name": null}', "name: must be a string."),
        (b'{"name": "x", "nome": "y"}', "nome: is not a known field."),
        (b'{"name": "a\\u0000b"}', "name: must not contain NUL"),
        (
            b'{"name": "\\ud800"}',
            "name: must not contain half of a surrogate pair; take out \\ud800, character 1.",
        ),
        (b'{"na\\u0000me": "x"}', "name must not contain NUL"),
    ],
)
def test_a_body_of_the_wrong_shape_names_the_field(api: Client, body: bytes, says: str) -> None:
    assert says in refused(post(api, body), 400, "invalid_request")


def test_every_wrong_field_is_named(api: Client) -> None:
    response = api.post("/v1/things", b'{"nome": 1}', content_type="application/json")
    assert response.json()["fields"] == {
        "name": "is required.",
        "nome": "is not a known field.",
    }


@pytest.mark.parametrize(
    "content_type", ["text/plain", "application/x-www-form-urlencoded", "application/jsonx", ""]
)
def test_another_content_type_is_a_415(api: Client, content_type: str) -> None:
    refused(post(api, b'{"name": "x"}', content_type), 415, "unsupported_media_type")


@pytest.mark.parametrize(
    "content_type", ["application/json; charset=utf-8", "Application/JSON", "application/json"]
)
def test_json_may_be_declared_with_parameters(api: Client, content_type: str) -> None:
    response = api.post("/v1/things", b'{"name": "x"}', content_type=content_type)
    assert response.status_code == 201


def test_a_body_over_the_calls_limit_is_a_413(api: Client) -> None:
    body = b'{"name": "' + b"x" * settings.USUAL_BODY + b'"}'
    assert "2,097,152" in refused(post(api, body), 413, "payload_too_large")


def test_text_beyond_ascii_passes_unchanged(api: Client) -> None:
    response = api.post("/v1/things", '{"name": "né𝒳"}', content_type="application/json")
    assert response.json()["name"] == "né𝒳"

"""How the API's tests ask and what they check of every refusal."""

from __future__ import annotations

from typing import Any

from django.test import Client


def post(api: Client, path: str, body: Any = None) -> Any:
    """POST a JSON body."""
    return api.post(path, {} if body is None else body, content_type="application/json")


def refusal(answer: Any, status: int, code: str) -> dict[str, Any]:
    """The body of a refusal, once it is known to have the form every refusal has."""
    assert answer.status_code == status, answer.content
    said: dict[str, Any] = answer.json()
    assert said["code"] == code, said
    assert said["detail"].strip()
    assert "Traceback" not in said["detail"]
    assert answer.headers["X-Request-Id"]
    return said

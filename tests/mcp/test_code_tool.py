"""The tool that runs code: text, pictures, and what went wrong."""

from __future__ import annotations

import pytest
from mcp_types import ImageContent, TextContent

from hostruntime.errors import InterpreterUnavailable
from hostruntime.wire.interpreter import CodeError, CodeFrame, CodeResult
from tests.fakes.host import FakeHost
from tests.mcp.conftest import Connect
from tests.mcp.test_tools import done, error_of

pytestmark = [pytest.mark.django_db(transaction=True)]

STARTED = CodeFrame("started", context_id="default")


async def test_code_comes_back_as_text_and_pictures(
    connect: Connect, key: str, host: FakeHost
) -> None:
    async with connect(key) as client:
        sandbox = (await done(client, "create_sandbox", template="debian-12"))["id"]
        figure = CodeResult("<Figure>", png="eA==")
        end = CodeFrame("done", context_id="default", interrupted=True, truncated=("stdout",))
        printed = CodeFrame("stream", text="out")
        host.code["plot"] = [STARTED, printed, CodeFrame("result", result=figure), end]
        result = await client.call_tool("run_code", {"sandbox_id": sandbox, "code": "plot"})
        text, image = result.content
        assert isinstance(text, TextContent)
        assert isinstance(image, ImageContent)
        assert (image.data, image.mime_type, result.is_error) == ("eA==", "image/png", False)
        for part in ("stdout:\nout", "<Figure>", "interrupted", "stdout."):
            assert part in text.text
        raised = CodeFrame("error", error=CodeError("ValueError", "bad", ("line 1",)))
        host.code["raise"] = [STARTED, raised, CodeFrame("done", context_id="default")]
        result = await client.call_tool("run_code", {"sandbox_id": sandbox, "code": "raise"})
        [text] = result.content
        assert isinstance(text, TextContent)
        assert (text.text, result.is_error) == ("line 1\nValueError: bad", True)
        host.code["x"] = [InterpreterUnavailable("It has no ipykernel.")]
        result = await client.call_tool("run_code", {"sandbox_id": sandbox, "code": "x"})
        assert error_of(result)["code"] == "interpreter_unavailable"

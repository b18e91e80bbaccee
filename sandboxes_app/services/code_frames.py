"""What comes of running code, in the shapes of the wire contract."""

from __future__ import annotations

from typing import Any, Literal

from hostruntime.wire.interpreter import CodeError, CodeFrame, CodeResult
from sandboxes_app.answers import CodeEnd, CodeException, CodeOutput

type Kind = Literal["text", "html", "image_png", "json", "chart"]


def code_result(result: CodeResult) -> CodeOutput:
    """A result of a run; ``type`` is its richest representation, and SVG is HTML as well."""
    return {
        "type": richest(result),
        "text": result.text,
        "html": result.html if result.html is not None else result.svg,
        "svg": result.svg,
        "png": result.png,
        "json": result.json,
        "chart": result.chart,
    }


def richest(result: CodeResult) -> Kind:
    """The richest representation of a result."""
    if result.chart is not None:
        return "chart"
    if result.png is not None:
        return "image_png"
    if result.html is not None or result.svg is not None:
        return "html"
    return "text" if result.json is None else "json"


def code_exception(error: CodeError | None) -> CodeException | None:
    """An exception that the code raised."""
    if error is None:
        return None
    return {"name": error.name, "value": error.value, "traceback": list(error.traceback)}


def code_end(last: CodeFrame, error: CodeError | None) -> CodeEnd:
    """How a run ended."""
    return {
        "error": code_exception(error),
        "execution_count": last.execution_count,
        "context_id": last.context_id,
        "duration_ms": last.duration_ms,
        "interrupted": last.interrupted,
        "restarted": last.restarted,
        "truncated": list(last.truncated),
    }


def code_frame(frame: CodeFrame, error: CodeError | None) -> dict[str, Any]:
    """A frame of a run's stream; ``error`` is the latest one."""
    if frame.kind == "stream":
        return {"kind": "stream", "stream": frame.stream, "text": frame.text}
    if frame.kind == "result" and frame.result is not None:
        return {"kind": "result", "result": code_result(frame.result)}
    if frame.kind == "error":
        return {"kind": "error", "error": code_exception(frame.error)}
    if frame.kind == "done":
        return {"kind": "done", **code_end(frame, error)}
    # Not in the contract, and ignored by its clients: that it runs.
    return {"kind": "started", "context_id": frame.context_id, "restarted": frame.restarted}


def code_failure(code: str, detail: str) -> dict[str, Any]:
    """The frame that ends a run's stream with an error of the service's."""
    error = {"name": code, "value": detail, "traceback": []}
    return {"kind": "error", "error": error, "error_code": code}

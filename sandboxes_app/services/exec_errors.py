"""The errors of commands that the host ended or refused."""

from __future__ import annotations

from hostruntime import errors as host_errors
from orkestr_console.core.errors import DomainError
from orkestr_console.core.hosts import translate_error
from sandboxes_app.models import Sandbox
from sandboxes_app.services.lifecycle import settle_if_missing
from sandboxes_app.services.refusals import describe_refusal

# How much output an error includes, so that a killed command still shows its work.
ERROR_OUTPUT_BYTES = 64 * 1024


def translate_exec_error(sandbox: Sandbox, error: host_errors.HostError) -> DomainError:
    """The domain error for a command that the host ended or refused; corrects the row."""
    if isinstance(error, (host_errors.ContainerGone, host_errors.NotFound)):
        settle_if_missing(sandbox)
        return translate_error(host_errors.ContainerGone(error.detail))
    domain = translate_error(error)
    if isinstance(error, host_errors.ExecTimeout):
        for stream in ("stdout", "stderr"):
            if isinstance(printed := error.extra.get(stream), bytes):
                domain.extra[stream] = decode_output(printed[-ERROR_OUTPUT_BYTES:])
        refusal = describe_refusal(sandbox.team, error.extra.get("refused", ()))
        if refusal is not None:
            domain.detail = f"{domain.detail} {refusal.message}"
            domain.extra["refused_hosts"] = list(refusal.hosts)
    return domain


def decode_output(data: bytes) -> str:
    """Output as text; invalid UTF-8 is replaced."""
    return data.decode("utf-8", "replace")

"""What to execute for a command that was asked for."""

from __future__ import annotations

from collections.abc import Sequence

from hostruntime.container.exec import shell_argv
from hostruntime.errors import InvalidRequest
from hostruntime.image.environment import check_environment
from hostruntime.wire.commands import Exec


def command_argv(request: Exec) -> Sequence[str]:
    """The argv of a command.  Raises InvalidRequest."""
    command = request.command
    argv = [command] if isinstance(command, str) else command
    if any("\0" in text for text in (*argv, request.cwd)):
        raise InvalidRequest("A command cannot contain a NUL character.")
    check_environment(request.env)
    return shell_argv(command) if isinstance(command, str) else argv

"""The environment baked into an image: what a template gives, and its recipe's /etc/environment.

Every step of the build and every command of a sandbox has it, over what the host gives and under
what the sandbox and the command give.  In a variable's value the first ``$ITSELF`` or ``${ITSELF}``
stands for what the variable would be without it: ``PATH=/opt/x/bin:$PATH``.  Nothing else is
replaced, so that a ``$`` in a value stays one.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from hostruntime.errors import InvalidRequest
from hostruntime.image.trees import opened, opened_if_directory

MAX_ENV_BYTES = 128 * 1024
# MAX_ARG_STRLEN of execve(2) on pages of 4 KiB: name, "=", value and the NUL that ends it.  For all
# of them together and the arguments there are 2 MiB (a quarter of the stack), which is more than
# what an image, a sandbox, a command and its text may have.
MAX_VARIABLE_BYTES = 128 * 1024
MAX_FILE_BYTES = 64 * 1024
ETC_ENVIRONMENT = "/etc/environment"
_LINE = re.compile(r"[ \t]*(?:export[ \t]+)?([A-Za-z_][A-Za-z0-9_]*)=(.*)", re.ASCII)
# One pattern for all names: re keeps 512, and to make one for each of thousands takes seconds.
_REFERENCE = re.compile(r"\$(?:([A-Za-z_][A-Za-z0-9_]*)|\{([A-Za-z_][A-Za-z0-9_]*)\})", re.ASCII)
# Which proxy there is depends on a sandbox's network, and not on that of the build.
_OF_THE_NETWORK = frozenset(
    {"http_proxy", "https_proxy", "ftp_proxy", "all_proxy", "no_proxy", "node_use_env_proxy"}
)

Environment = dict[str, str]


def baked(below: Mapping[str, str], own: Mapping[str, str]) -> Environment:
    """``own`` over what is baked ``below`` it; what refers to neither is left to refer."""
    found = dict(below)
    for name, value in own.items():
        found[name] = _filled(name, value, below[name]) if name in below else value
    return found


def resolved(under: Mapping[str, str], over: Mapping[str, str]) -> Environment:
    """The environment of a process: a baked one over the one that the host gives."""
    filled = {name: _filled(name, value, under.get(name, "")) for name, value in over.items()}
    return {**under, **filled}


def _filled(name: str, value: str, before: str) -> str:
    """A value with what it was before in the place of its own name; of nothing no ``:`` is left.

    An empty entry of a list of directories is the working directory (environ(7)).
    """
    reference = next(
        (found for found in _REFERENCE.finditer(value) if name in found.groups()), None
    )
    if reference is None:
        return value
    head, tail = value[: reference.start()], value[reference.end() :]
    if not before:
        head, tail = (head.removesuffix(":"), tail) if head else (head, tail.removeprefix(":"))
    return head + before + tail


def check_environment(env: Mapping[str, str]) -> None:
    """Raise InvalidRequest unless these can be environment variables (environ(7))."""
    for name, value in env.items():
        if not name or "=" in name or "\0" in name:
            raise InvalidRequest(f"{name!r} cannot be the name of an environment variable.")
        if "\0" in value:
            raise InvalidRequest(f"The environment variable {name} contains a NUL character.")
    check_variables(env)
    if (size := sum(_bytes(name) + _bytes(value) for name, value in env.items())) > MAX_ENV_BYTES:
        raise InvalidRequest(
            f"The environment has {size:,} bytes altogether, and may have {MAX_ENV_BYTES:,}; put "
            "what is large into a file."
        )


def check_variables(env: Mapping[str, str]) -> None:
    """Raise InvalidRequest for a variable that the kernel gives no process (execve(2))."""
    for name, value in env.items():
        if (size := _bytes(name) + _bytes(value) + 2) > MAX_VARIABLE_BYTES:
            raise InvalidRequest(
                f"The environment variable {name} would have {size:,} bytes, with what it stands "
                f"on, and the kernel takes {MAX_VARIABLE_BYTES:,} at most; put it into a file."
            )


def _bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))


# /etc/environment ---------------------------------------------------------------------------


def written(text: str, before: str, host: Mapping[str, str]) -> Environment:
    """What a recipe wrote to /etc/environment: what was not there, and is not the host's own."""
    old = read_lines(before)
    return {
        name: value
        for name, value in read_lines(text).items()
        if old.get(name) != value
        and host.get(name) != value
        and name.lower() not in _OF_THE_NETWORK
    }


def read_lines(text: str) -> Environment:
    """The variables of an /etc/environment, read as pam_env(8) does: no shell, quotes go."""
    found: Environment = {}
    for line in text.split("\n"):
        if match := _LINE.fullmatch(line.rstrip()):
            name, value = match.groups()
            if value[:1] in {'"', "'"}:
                value = value[1:].removesuffix(value[0])
            if "\0" not in value:
                found[name] = _filled(name, value, found[name]) if name in found else value
    return found


def file_of(tree: Path) -> str:
    """An image's /etc/environment, by descriptors and through no link; empty if it has none."""
    with opened(tree) as root, opened_if_directory("etc", root) as etc:
        if etc is None:
            return ""
        with _regular("environment", etc) as descriptor:
            return "" if descriptor is None else _beginning(descriptor)


@contextmanager
def _regular(name: str, directory: int) -> Iterator[int | None]:
    # Not blocking: a pipe of that name would wait for its other end.
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    try:
        descriptor = os.open(name, flags, dir_fd=directory)
    except OSError:
        yield None
        return
    try:
        yield descriptor if stat.S_ISREG(os.fstat(descriptor).st_mode) else None
    finally:
        os.close(descriptor)


def _beginning(descriptor: int) -> str:
    with open(descriptor, "rb", closefd=False) as file:
        return decoded(file.read(MAX_FILE_BYTES + 1))


def decoded(data: bytes) -> str:
    """The text of an /etc/environment; of one that is too large its whole lines."""
    text = data.decode("utf-8", "replace")
    return text if len(data) <= MAX_FILE_BYTES else text.rpartition("\n")[0]

"""The environment baked into an image: the template's ``env`` and the recipe's /etc/environment.

It applies to every step of the build and every command of a sandbox. It overrides the host's
variables; those of the sandbox and of the command override it. In a variable's value the first
``$ITSELF`` or ``${ITSELF}`` stands for the variable's previous value: ``PATH=/opt/x/bin:$PATH``.
Nothing else is expanded, so any other ``$`` stays literal.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from hostruntime.errors import InvalidRequest
from hostruntime.image.trees import open_directory, open_if_directory

MAX_ENV_BYTES = 128 * 1024
# MAX_ARG_STRLEN of execve(2) with 4 KiB pages: name, "=", value and the terminating NUL. All
# variables and arguments together may have 2 MiB (a quarter of the stack), more than the limits of
# an image, a sandbox, a command and its text add up to.
MAX_VARIABLE_BYTES = 128 * 1024
MAX_FILE_BYTES = 64 * 1024
ETC_ENVIRONMENT = "/etc/environment"
_LINE = re.compile(r"[ \t]*(?:export[ \t]+)?([A-Za-z_][A-Za-z0-9_]*)=(.*)", re.ASCII)
# One pattern for all names: re caches 512, and compiling one for each of thousands takes seconds.
_REFERENCE = re.compile(r"\$(?:([A-Za-z_][A-Za-z0-9_]*)|\{([A-Za-z_][A-Za-z0-9_]*)\})", re.ASCII)
# The proxy depends on the sandbox's network, not on the build's.
_PROXY_VARIABLES = frozenset(
    {"http_proxy", "https_proxy", "ftp_proxy", "all_proxy", "no_proxy", "node_use_env_proxy"}
)

Environment = dict[str, str]


def merge_baked(below: Mapping[str, str], own: Mapping[str, str]) -> Environment:
    """Merge ``own`` over the baked ``below``; references to variables in neither stay."""
    found = dict(below)
    for name, value in own.items():
        found[name] = _expand(name, value, below[name]) if name in below else value
    return found


def resolve_environment(under: Mapping[str, str], over: Mapping[str, str]) -> Environment:
    """Return the environment of a process: the baked ``over`` over the host's ``under``."""
    expanded = {name: _expand(name, value, under.get(name, "")) for name, value in over.items()}
    return {**under, **expanded}


def _expand(name: str, value: str, before: str) -> str:
    """Replace a variable's reference to itself by its previous value.

    If that is empty, the adjacent ``:`` goes too: an empty entry in a list of directories means the
    working directory (environ(7)).
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
    check_variable_sizes(env)
    if (
        size := sum(_byte_length(name) + _byte_length(value) for name, value in env.items())
    ) > MAX_ENV_BYTES:
        raise InvalidRequest(
            f"The environment has {size:,} bytes altogether, and may have {MAX_ENV_BYTES:,}; put "
            "what is large into a file."
        )


def check_variable_sizes(env: Mapping[str, str]) -> None:
    """Raise InvalidRequest for a variable too large for execve(2)."""
    for name, value in env.items():
        if (size := _byte_length(name) + _byte_length(value) + 2) > MAX_VARIABLE_BYTES:
            raise InvalidRequest(
                f"The environment variable {name} would have {size:,} bytes, with what it stands "
                f"on, and the kernel takes {MAX_VARIABLE_BYTES:,} at most; put it into a file."
            )


def _byte_length(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))


# /etc/environment ---------------------------------------------------------------------------


def recipe_variables(text: str, before: str, host: Mapping[str, str]) -> Environment:
    """Return what a recipe added to /etc/environment, without the host's own variables."""
    old = parse_environment_file(before)
    return {
        name: value
        for name, value in parse_environment_file(text).items()
        if old.get(name) != value
        and host.get(name) != value
        and name.lower() not in _PROXY_VARIABLES
    }


def parse_environment_file(text: str) -> Environment:
    """Parse /etc/environment as pam_env(8) does: no shell syntax, quotes are removed."""
    found: Environment = {}
    for line in text.split("\n"):
        if match := _LINE.fullmatch(line.rstrip()):
            name, value = match.groups()
            if value[:1] in {'"', "'"}:
                value = value[1:].removesuffix(value[0])
            if "\0" not in value:
                found[name] = _expand(name, value, found[name]) if name in found else value
    return found


def read_environment_file(tree: Path) -> str:
    """Read an image's /etc/environment without following links; empty if it has none."""
    with open_directory(tree) as root, open_if_directory("etc", root) as etc:
        if etc is None:
            return ""
        with _open_regular("environment", etc) as descriptor:
            return "" if descriptor is None else _read_limited(descriptor)


@contextmanager
def _open_regular(name: str, directory: int) -> Iterator[int | None]:
    # Non-blocking: opening a FIFO would wait for its writer.
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


def _read_limited(descriptor: int) -> str:
    with open(descriptor, "rb", closefd=False) as file:
        return decode_environment_file(file.read(MAX_FILE_BYTES + 1))


def decode_environment_file(data: bytes) -> str:
    """Decode an /etc/environment; one that is too large is cut after its last complete line."""
    text = data.decode("utf-8", "replace")
    return text if len(data) <= MAX_FILE_BYTES else text.rpartition("\n")[0]

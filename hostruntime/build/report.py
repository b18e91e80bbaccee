"""Messages that explain a failed build: which step, its command, the end of its output."""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

from hostruntime.build.invisible import describe_unusual_characters, reveal
from hostruntime.container.exec import Exited
from hostruntime.errors import BuildFailed

_COMMAND_CHARACTERS = 400
_MAX_NAMED = 5
# How many refused hosts an event carries.
MAX_REFUSED = 20


@dataclass(frozen=True)
class RefusedHost:
    """A host that the network policy refused; ``reason`` is the verdict's reason code.

    ``direct`` means the proxy was bypassed: the host was looked up by DNS (``port`` is then 0), or
    is an address that was tried.
    """

    host: str
    port: int
    reason: str
    direct: bool = False

    @property
    def can_be_listed(self) -> bool:
        """Whether naming it in ``allow_domains`` would let it through."""
        return self.reason == "not_listed"

    def to_wire(self) -> dict[str, Any]:
        """Return the form used in events and in a layer's record."""
        return {**asdict(self), "can_be_listed": self.can_be_listed}

    @classmethod
    def from_wire(cls, record: Mapping[str, Any]) -> Self:
        """Parse the output of :meth:`to_wire`; raises KeyError, TypeError for anything else."""
        host, port, reason = str(record["host"]), int(record["port"]), str(record["reason"])
        return cls(host, port, reason, bool(record.get("direct")))

    def __str__(self) -> str:
        """Return the host with its port, and how it was requested if not through the proxy."""
        if self.port == 0:
            return f"{self.host} (by DNS)"
        bypassed = self.direct and self.reason != "network_off"
        return f"{self.host}:{self.port}{' (past the proxy)' if bypassed else ''}"


def step_failed(
    step: int,
    total: int,
    command: str,
    tail: str,
    end: Exited,
    refused: Sequence[RefusedHost],
    unreached: Sequence[UnreachedNotice] = (),
) -> BuildFailed:
    """A step that exited non-zero or was killed by a signal."""
    if end.signal is None:
        how = f"exited with status {end.code}"
    else:
        how = f"was killed by signal {end.signal} ({_signal_name(end.signal)})"
    head = f"Step {step} of {total} failed: {_quoted(command)} {how}."
    hints = [_refusal_hint(refused), _unreached_hint(unreached)]
    parts = [head, describe_unusual_characters(command), _output_tail(tail), *hints]
    # Nearly always the cause: a program that can do without a refused host does not fail.
    reason = "network_policy_blocked" if refused else "step_failed"
    return _failure(reason, parts, step, refused)


def step_timed_out(
    step: int,
    total: int,
    command: str,
    tail: str,
    seconds: float,
    refused: Sequence[RefusedHost] = (),
    unreached: Sequence[UnreachedNotice] = (),
) -> BuildFailed:
    """A step that exceeded its time limit."""
    head = (
        f"Step {step} of {total} was stopped: {_quoted(command)} was still running after "
        f"{seconds:g} seconds, the limit for a step."
    )
    parts = [head, _output_tail(tail), _refusal_hint(refused), _unreached_hint(unreached)]
    return _failure("step_timeout", parts, step, refused)


def build_timed_out(
    seconds: float,
    step: int = 0,
    total: int = 0,
    command: str = "",
    tail: str = "",
    refused: Sequence[RefusedHost] = (),
    unreached: Sequence[UnreachedNotice] = (),
) -> BuildFailed:
    """A build that exceeded its time limit; ``step`` is 0 after the last step."""
    if step == 0:
        head = (
            f"The build was stopped: it took longer than {seconds:g} seconds, the limit for a "
            "build."
        )
        return _failure("build_timeout", [head], None)
    head = (
        f"The build was stopped in step {step} of {total}, {_quoted(command)}: it took longer "
        f"than {seconds:g} seconds, the limit for a whole build."
    )
    parts = [head, _output_tail(tail), _refusal_hint(refused), _unreached_hint(unreached)]
    return _failure("build_timeout", parts, step, refused)


def out_of_memory(step: int, total: int, command: str, tail: str, memory_mb: int) -> BuildFailed:
    """A step that failed because the kernel killed a process for lack of memory."""
    head = (
        f"Step {step} of {total} failed: {_quoted(command)} ran out of memory. A build has "
        f"{memory_mb} MiB, and what is in /tmp and /workspace counts towards it."
    )
    return _failure("out_of_memory", [head, _output_tail(tail)], step)


def out_of_disk(step: int, total: int, command: str, tail: str, disk_mb: int) -> BuildFailed:
    """A step that failed with its disk full."""
    head = (
        f"Step {step} of {total} failed: {_quoted(command)} ran out of disk. A build has {disk_mb} "
        f"MiB, and one file for every 16 KiB of it; delete what later steps don't need."
    )
    return _failure("out_of_disk", [head, _output_tail(tail)], step)


def environment_too_large(step: int, why: str) -> BuildFailed:
    """An environment too large for any process; ``step`` wrote it, 0 if none did."""
    head = f"Step {step} wrote too much to /etc/environment. " if step else ""
    head += "No process can start with this image's environment. "
    return _failure("environment_too_large", [f"{head}{why}"], step or None)


def container_stopped(step: int, total: int, command: str, tail: str) -> BuildFailed:
    """A step that stopped its own container."""
    head = (
        f"Step {step} of {total} failed: the build's container stopped while {_quoted(command)} "
        "was running. A step must not shut the machine down."
    )
    return _failure("step_failed", [head, _output_tail(tail)], step)


@dataclass(frozen=True)
class UnreachedNotice:
    """An allowed host that could not be reached; ``message`` has no final full stop.

    ``direct`` means the proxy was bypassed.
    """

    message: str
    direct: bool = False


def unreached_message(unreached: Sequence[UnreachedNotice]) -> str:
    """Return the message for a step that succeeded without reaching some hosts."""
    listed = "; ".join(notice.message for notice in unreached[:_MAX_NAMED])
    return f"This step succeeded, but something may be missing: {listed}."


def lost_writes_message(paths: Sequence[str]) -> str:
    """Return the message for files a step changed that are not part of the image."""
    return (
        f"This step changed {', '.join(paths)}. This isn't kept: every sandbox gets "
        f"{'it' if len(paths) == 1 else 'them'} from the host it runs on, as its network needs."
    )


def _failure(
    reason: str, parts: Sequence[str], step: int | None, refused: Sequence[RefusedHost] = ()
) -> BuildFailed:
    detail = "\n\n".join(part for part in parts if part)
    listable = list(dict.fromkeys(each.host for each in refused if each.can_be_listed))
    return BuildFailed(detail, reason=reason, step=step, refused=listable[:MAX_REFUSED])


def _quoted(command: str) -> str:
    text = command.strip(" \t\n")
    if len(text) > _COMMAND_CHARACTERS:
        text = text[:_COMMAND_CHARACTERS] + "…"
    return f"`{reveal(text)}`"


def _output_tail(tail: str) -> str:
    return f"The end of its output:\n{tail}" if tail else "It printed no output."


def _refusal_hint(refused: Sequence[RefusedHost]) -> str:
    if not refused:
        return ""
    names = ", ".join(map(str, refused[:_MAX_NAMED]))
    more = f" and {len(refused) - _MAX_NAMED} more" if len(refused) > _MAX_NAMED else ""
    return f"During this step the network policy refused: {names}{more}. {_remedy(refused)}"


def _unreached_hint(unreached: Sequence[UnreachedNotice]) -> str:
    """The policy is not to blame for these, and no allowlist would help."""
    if not unreached:
        return ""
    listed = "; ".join(notice.message for notice in unreached[:_MAX_NAMED])
    return (
        f"During this step, although the policy allows it: {listed}. An allowlist won't change "
        "that."
    )


def _remedy(refused: Sequence[RefusedHost]) -> str:
    if any(host.can_be_listed for host in refused):
        return (
            'If the step needs it, rebuild with it in "allow_domains" (along with "@default", '
            f'the default list){_direct_remedy(refused)}, or with network "open".'
        )
    if all(host.reason == "network_off" for host in refused):
        return (
            'This build has network "off". If the step needs it, rebuild with network '
            '"restricted" and the host in "allow_domains", or with network "open".'
        )
    if all(host.reason == "not_https" for host in refused):
        return "Only HTTPS is allowed: use https:// addresses."
    return 'Only HTTPS to public hosts, by name, is allowed; network "open" allows other ports.'


def _direct_remedy(refused: Sequence[RefusedHost]) -> str:
    """What else a program that uses DNS needs: the allowlist alone would not help it."""
    if not any(host.direct and host.can_be_listed for host in refused):
        return ""
    return (
        " and have the program that asked DNS use the proxy (the address in $HTTPS_PROXY, in its "
        "environment or as a proxy setting of its own)"
    )


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"SIGRTMIN+{number - signal.SIGRTMIN}"

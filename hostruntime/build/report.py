"""The sentences a failed build is explained with: which step, what it did, what it last said."""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

from hostruntime.build.hidden import odd_characters, shown
from hostruntime.container.exec import Exited
from hostruntime.errors import BuildFailed

_COMMAND_CHARACTERS = 400
_REFUSALS = 5
# How many of them an event carries.
MAX_REFUSED = 20


@dataclass(frozen=True)
class Refused:
    """A host that the network policy refused; ``reason`` is the policy's word for why.

    ``direct``: it was asked for past the proxy, by DNS, which names no port (0), or is an address
    that was tried.
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
        """As an event and a layer's record have it."""
        return {**asdict(self), "can_be_listed": self.can_be_listed}

    @classmethod
    def from_wire(cls, record: Mapping[str, Any]) -> Self:
        """Read what :meth:`to_wire` wrote; raises KeyError, TypeError for anything else."""
        host, port, reason = str(record["host"]), int(record["port"]), str(record["reason"])
        return cls(host, port, reason, bool(record.get("direct")))

    def __str__(self) -> str:
        """The host with its port, and how it was asked for if not by the proxy."""
        if self.port == 0:
            return f"{self.host} (by DNS)"
        past = self.direct and self.reason != "network_off"
        return f"{self.host}:{self.port}{' (past the proxy)' if past else ''}"


def step_failed(
    step: int,
    total: int,
    command: str,
    tail: str,
    end: Exited,
    refused: Sequence[Refused],
    unreached: Sequence[NotReached] = (),
) -> BuildFailed:
    """A step that exited non-zero or was killed by a signal."""
    if end.signal is None:
        how = f"exited with status {end.code}"
    else:
        how = f"was killed by signal {end.signal} ({_signal_name(end.signal)})"
    head = f"Step {step} of {total} failed: {_quoted(command)} {how}."
    hints = [_refusal_hint(refused), _unreached_hint(unreached)]
    parts = [head, odd_characters(command), _ending(tail), *hints]
    # Nearly always why: a program that can do without what it was refused does not fail.
    reason = "network_policy_blocked" if refused else "step_failed"
    return _failure(reason, parts, step, refused)


def ran_past_step_time(
    step: int,
    total: int,
    command: str,
    tail: str,
    seconds: float,
    refused: Sequence[Refused] = (),
    unreached: Sequence[NotReached] = (),
) -> BuildFailed:
    """A step that took longer than a step may."""
    head = (
        f"Step {step} of {total} was stopped: {_quoted(command)} was still running after "
        f"{seconds:g} seconds, the limit for a step."
    )
    parts = [head, _ending(tail), _refusal_hint(refused), _unreached_hint(unreached)]
    return _failure("step_timeout", parts, step, refused)


def ran_past_build_time(
    seconds: float,
    step: int = 0,
    total: int = 0,
    command: str = "",
    tail: str = "",
    refused: Sequence[Refused] = (),
    unreached: Sequence[NotReached] = (),
) -> BuildFailed:
    """A build that took longer than a build may; ``step`` is 0 after the last step."""
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
    parts = [head, _ending(tail), _refusal_hint(refused), _unreached_hint(unreached)]
    return _failure("build_timeout", parts, step, refused)


def out_of_memory(step: int, total: int, command: str, tail: str, memory_mb: int) -> BuildFailed:
    """A step that ended because the kernel killed something for memory."""
    head = (
        f"Step {step} of {total} failed: {_quoted(command)} ran out of memory. A build has "
        f"{memory_mb} MiB, and what is in /tmp and /workspace counts towards it."
    )
    return _failure("out_of_memory", [head, _ending(tail)], step)


def out_of_disk(step: int, total: int, command: str, tail: str, disk_mb: int) -> BuildFailed:
    """A step that failed with its disk full."""
    head = (
        f"Step {step} of {total} failed: {_quoted(command)} ran out of disk. A build has {disk_mb} "
        f"MiB, and one file for every 16 KiB of it; delete what later steps don't need."
    )
    return _failure("out_of_disk", [head, _ending(tail)], step)


def environment_too_large(step: int, why: str) -> BuildFailed:
    """An environment that no process can be given; ``step`` wrote it, 0 if none did yet."""
    said = f"Step {step} wrote too much to /etc/environment. " if step else ""
    said += "No process can start with this image's environment. "
    return _failure("environment_too_large", [f"{said}{why}"], step or None)


def container_stopped(step: int, total: int, command: str, tail: str) -> BuildFailed:
    """A step that ended its own container."""
    head = (
        f"Step {step} of {total} failed: the build's container stopped while {_quoted(command)} "
        "was running. A step must not shut the machine down."
    )
    return _failure("step_failed", [head, _ending(tail)], step)


@dataclass(frozen=True)
class NotReached:
    """An allowed host that could not be reached, in a sentence without its full stop.

    ``direct``: it was asked for past the proxy.
    """

    message: str
    direct: bool = False


def went_without(unreached: Sequence[NotReached]) -> str:
    """What a step that succeeded did not get."""
    shown = "; ".join(one.message for one in unreached[:_REFUSALS])
    return f"This step succeeded, but something may be missing: {shown}."


def not_kept(paths: Sequence[str]) -> str:
    """What a step changed in vain."""
    return (
        f"This step changed {', '.join(paths)}. This isn't kept: every sandbox gets "
        f"{'it' if len(paths) == 1 else 'them'} from the host it runs on, as its network needs."
    )


def _failure(
    reason: str, parts: Sequence[str], step: int | None, refused: Sequence[Refused] = ()
) -> BuildFailed:
    detail = "\n\n".join(part for part in parts if part)
    listable = list(dict.fromkeys(one.host for one in refused if one.can_be_listed))
    return BuildFailed(detail, reason=reason, step=step, refused=listable[:MAX_REFUSED])


def _quoted(command: str) -> str:
    text = command.strip(" \t\n")
    if len(text) > _COMMAND_CHARACTERS:
        text = text[:_COMMAND_CHARACTERS] + "…"
    return f"`{shown(text)}`"


def _ending(tail: str) -> str:
    return f"The end of its output:\n{tail}" if tail else "It printed no output."


def _refusal_hint(refused: Sequence[Refused]) -> str:
    if not refused:
        return ""
    names = ", ".join(map(str, refused[:_REFUSALS]))
    more = f" and {len(refused) - _REFUSALS} more" if len(refused) > _REFUSALS else ""
    return f"During this step the network policy refused: {names}{more}. {_remedy(refused)}"


def _unreached_hint(unreached: Sequence[NotReached]) -> str:
    """No policy is to blame for these, and no list would help."""
    if not unreached:
        return ""
    shown = "; ".join(one.message for one in unreached[:_REFUSALS])
    return (
        f"During this step, although the policy allows it: {shown}. An allowlist won't change that."
    )


def _remedy(refused: Sequence[Refused]) -> str:
    if any(one.can_be_listed for one in refused):
        return (
            'If the step needs it, rebuild with it in "allow_domains" (along with "@default", '
            f'the default list){_direct_remedy(refused)}, or with network "open".'
        )
    if all(one.reason == "network_off" for one in refused):
        return (
            'This build has network "off". If the step needs it, rebuild with network '
            '"restricted" and the host in "allow_domains", or with network "open".'
        )
    if all(one.reason == "not_https" for one in refused):
        return "Only HTTPS is allowed: use https:// addresses."
    return 'Only HTTPS to public hosts, by name, is allowed; network "open" allows other ports.'


def _direct_remedy(refused: Sequence[Refused]) -> str:
    """What else a program needs that asks DNS: the list alone would change nothing for it."""
    if not any(one.direct and one.can_be_listed for one in refused):
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

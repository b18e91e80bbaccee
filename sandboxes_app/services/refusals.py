"""What a command was refused by the network policy: for people, and for programs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hostruntime.wire.background import CommandInfo
from hostruntime.wire.commands import RefusedRequest
from orkestr_console.accounts.actor import Actor
from orkestr_console.accounts.limits import Envelope, build_envelope
from orkestr_console.accounts.models import Team
from sandboxes_app.answers import RefusedRequests

CODE = "network_policy_blocked"
# How many a sentence names.
MAX_NAMED = 5


@dataclass(frozen=True)
class Refusal:
    """What was refused while a command ran; ``hosts`` are those that could be allowed by name."""

    message: str
    hosts: tuple[str, ...]

    @property
    def members(self) -> RefusedRequests:
        """What an answer has beside the exit status."""
        return {
            "error_code": CODE,
            "error_message": self.message,
            "refused_hosts": list(self.hosts),
        }

    @property
    def notice(self) -> str:
        """A line for standard error, as official clients show nothing else."""
        return f"\n[{CODE}: {self.message}]\n"


def describe_refusal(team: Team, refused: Sequence[RefusedRequest]) -> Refusal | None:
    """What to tell of these requests; None if there are none.

    The host doesn't know which process asked, so this may be about another command's.
    """
    if not refused:
        return None
    named = ", ".join(map(_name, refused[:MAX_NAMED]))
    more = f" and {len(refused) - MAX_NAMED} more" if len(refused) > MAX_NAMED else ""
    listable = tuple(dict.fromkeys(one.host for one in refused if _can_be_listed(one)))
    message = (
        f"While this command ran, the network policy refused its sandbox {named}{more}. "
        f"{_remedy(build_envelope(team), refused)}"
    )
    return Refusal(message, listable)


def refusal_of(actor: Actor, command: CommandInfo) -> Refusal | None:
    """The same of a background command."""
    return describe_refusal(actor.team, command.refused)


def _name(request: RefusedRequest) -> str:
    if request.port == 0:
        return f"{request.host} (by DNS)"
    return f"{request.host}:{request.port}{' (past the proxy)' if request.direct else ''}"


def _can_be_listed(request: RefusedRequest) -> bool:
    return request.reason == "not_listed"


def _remedy(allowed: Envelope, refused: Sequence[RefusedRequest]) -> str:
    if not any(map(_can_be_listed, refused)):
        if all(one.reason == "not_https" for one in refused):
            return "Only HTTPS is allowed: use https:// addresses."
        return (
            "Only HTTPS to public hosts, by name and through the proxy in $HTTPS_PROXY, gets out."
        )
    ways = []
    if allowed.may_list:
        ways.append('with the host in allow_domains (along with "@default", the default list)')
    if allowed.may_open:
        ways.append('with network "open"')
    if not ways:
        return "Your team's sandboxes reach only the default list; its limits page says why."
    remedy = f"If it is needed, create a sandbox {' or '.join(ways)}"
    if any(one.direct and _can_be_listed(one) for one in refused):
        remedy += ", and have the program that asked DNS use the proxy in $HTTPS_PROXY"
    return f"{remedy}."

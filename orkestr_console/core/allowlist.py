"""The restricted network's allowlist, as templates and sandboxes request it."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator

from hostruntime.network.policy import DEFAULT_LIST, PolicyError, normalise_domains


def usable_domains(domains: list[str] | None) -> list[str] | None:
    """An allowlist in normal form. Raises ``ValueError``."""
    if domains is None:
        return None
    try:
        return list(normalise_domains(domains))
    except PolicyError as error:
        raise ValueError(str(error)) from None


def extend_default(names: str) -> list[str] | None:
    """The default list extended by the names typed; None if there are none."""
    own = split_names(names)
    return [DEFAULT_LIST, *own] if own else None


def split_names(typed: str) -> list[str]:
    """The names typed, separated by spaces or commas."""
    return typed.replace(",", " ").split()


def replaces_default(domains: list[str] | None) -> bool:
    """Whether an allowlist, even an empty one, replaces the default list."""
    return domains is not None and DEFAULT_LIST not in domains


def extra_names(domains: list[str] | None) -> str:
    """The names of an allowlist besides the default list, separated by spaces."""
    return " ".join(domain for domain in domains or () if domain != DEFAULT_LIST)


Allowlist = Annotated[list[str] | None, AfterValidator(usable_domains)]

"""What may be asked of the restricted network's allowlist, of templates and sandboxes alike."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator

from hostruntime.network.policy import DEFAULT_LIST, PolicyError, normalise_domains


def usable_domains(domains: list[str] | None) -> list[str] | None:
    """An allowlist in its normal form."""
    if domains is None:
        return None
    try:
        return list(normalise_domains(domains))
    except PolicyError as error:
        raise ValueError(str(error)) from None


def besides_default(names: str) -> list[str] | None:
    """A person's own names, typed with blanks or commas between, beside the default list's."""
    own = names_in(names)
    return [DEFAULT_LIST, *own] if own else None


def names_in(typed: str) -> list[str]:
    """The names that a person typed, with blanks or commas between."""
    return typed.replace(",", " ").split()


def replaces_default(domains: list[str] | None) -> bool:
    """Whether an allowlist stands in place of the default list, be it empty."""
    return domains is not None and DEFAULT_LIST not in domains


def own_names(domains: list[str] | None) -> str:
    """The names of an allowlist that are not the default list, as they are typed."""
    return " ".join(domain for domain in domains or () if domain != DEFAULT_LIST)


Allowlist = Annotated[list[str] | None, AfterValidator(usable_domains)]

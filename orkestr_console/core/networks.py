"""Settings that list networks."""

from __future__ import annotations

from collections.abc import Mapping

from hostruntime.network.policy import PolicyError, parse_networks


def listed_networks(name: str, environment: Mapping[str, str]) -> list[str]:
    """The networks in a variable, separated by commas. Raises ``ValueError`` naming it."""
    texts = environment.get(name, "").replace(",", " ").split()
    try:
        parse_networks(texts)
    except PolicyError as error:
        raise ValueError(f"{name}: {error}") from error
    return texts

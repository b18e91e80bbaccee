"""Hosts that a build's programs tried to reach without the proxy, and the setting they need.

An allowlist doesn't help a program that doesn't use the proxy. The wording is the same on the step,
on the page, and in the advice to agents.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from orkestr_console.core.text import shorten_list
from templates_app.models import Template

# The events that list the hosts refused to a step.
REFUSAL_EVENTS = ("step_finished", "step_cached")


def bypass_advice(refused: Iterable[Mapping[str, Any]], who: str) -> list[str]:
    """Advice, in sentences, for the programs of ``who`` ("This step") that bypassed the proxy.

    ``refused`` are hosts in the form of the host's events.
    """
    direct = [refusal for refusal in refused if refusal.get("direct")]
    names = unique_hosts(refusal for refusal in direct if refusal.get("can_be_listed"))
    addresses = unique_hosts(refusal for refusal in direct if refusal.get("reason") == "past_proxy")
    sentences = []
    if names:
        pronoun = "it" if len(names) == 1 else "they"
        sentences.append(
            f"{who} asked DNS for {shorten_list(names)}, past the proxy. In allow_domains alone "
            f"{pronoun} would not be reached: the program also needs the address "
            "in $HTTPS_PROXY as its proxy."
        )
    if addresses:
        sentences.append(
            f"{who} tried {shorten_list(addresses)} by address, past the proxy, which is the "
            "only way out: the program needs the address in $HTTPS_PROXY as its proxy, "
            "and has to ask for a host by name."
        )
    return sentences


def unique_hosts(refused: Iterable[Mapping[str, Any]]) -> list[str]:
    """The hosts, each once."""
    return list(dict.fromkeys(str(refusal["host"]) for refusal in refused))


def advice(template: Template) -> list[str]:
    """Advice for each step of a build whose programs bypassed the proxy."""
    events = template.events.filter(kind__in=REFUSAL_EVENTS, payload__has_key="refused").order_by(
        "seq"
    )
    return [
        sentence
        for step, payload in events.values_list("step", "payload")
        for sentence in bypass_advice(payload["refused"] or (), f"Step {step}")
    ]

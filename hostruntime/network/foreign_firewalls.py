"""Rules of others on this host (Docker's, ufw's, firewalld's) that would cut sandboxes off.

A packet passes only if the chains of every table let it, so what another table drops or rejects
by default has to let sandboxes through by a rule of its own; what ours accepts does not help.
Rules are read from nftables, which has those of iptables-nft (Debian's iptables) as well, and from
iptables-legacy, whose rules nftables does not see.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hostruntime.host.run import MINIMAL_ENVIRONMENT, run
from hostruntime.network.firewall import PROXY_PORT

_TIMEOUT = 20.0
_INTERFACES = "ork"
_OURS = re.compile(r"orkestr_\d+")
_LEGACY_TABLES = Path("/proc/net/ip_tables_names")
_LOST = {
    "forward": "drops what is forwarded: sandboxes on network open reach nothing",
    "input": "drops what comes in: sandboxes on network restricted do not reach the egress proxy",
}
_ANEW = " (and again after each boot of the machine)"
# What lets sandboxes through, in the words of iptables(8).
_LETTING = {
    "forward": ("-i ork+ -j ACCEPT", "-o ork+ -j ACCEPT"),
    "input": (f"-i ork+ -p tcp --dport {PROXY_PORT} -j ACCEPT",),
}


@dataclass(frozen=True)
class Barrier:
    """One chain in the way: what that means, and the commands that let sandboxes through it."""

    seen: str
    remedy: str


@dataclass(frozen=True)
class _Chain:
    """A base chain that drops what no rule of its table accepts; `hook` in lower case."""

    hook: str
    family: str
    table: str
    name: str
    # Every chain of its table, which tell whose it is.
    siblings: frozenset[str]
    program: str = "iptables"

    def barrier(self) -> Barrier:
        """What to say of it."""
        whose, remedy = self._remedy()
        kind = "legacy iptables chain" if self.program == "iptables-legacy" else "the chain"
        where = f"{kind} {self.family} {self.table} {self.name}{whose}"
        return Barrier(f"{where} {_LOST[self.hook]}", remedy)

    def _remedy(self) -> tuple[str, str]:
        rules = _LETTING[self.hook]
        if "ufw-before-forward" in self.siblings:
            lines = " and ".join(f"`-A ufw-before-{self.hook} {rule}`" for rule in rules)
            return " (ufw)", f"put {lines} before COMMIT in /etc/ufw/before.rules; ufw reload"
        if self.table == "firewalld":
            add = "firewall-cmd --permanent --zone=trusted --add-interface=ork+"
            return " (firewalld)", f"{add} && firewall-cmd --reload"
        if self.hook == "forward" and "DOCKER-USER" in self.siblings:
            return " (Docker)", self._insert("DOCKER-USER") + _ANEW
        if self.program == "iptables-legacy":
            return "", self._insert(self.name) + _ANEW
        return "", self._insert_by_nft() + _ANEW

    def _insert(self, chain: str) -> str:
        return " && ".join(f"{self.program} -I {chain} {rule}" for rule in _LETTING[self.hook])

    def _insert_by_nft(self) -> str:
        place = f"{self.family} {self.table} {self.name}"
        port = f" tcp dport {PROXY_PORT}" if self.hook == "input" else ""
        words = ("iifname", "oifname") if self.hook == "forward" else ("iifname",)
        return " && ".join(f"nft 'insert rule {place} {w} \"ork*\"{port} accept'" for w in words)


def barriers() -> list[Barrier]:
    """What on this host would cut sandboxes off; raises CommandFailed, as for who is not root."""
    listing = run(["nft", "-j", "list", "ruleset"], timeout=_TIMEOUT).stdout or b"{}"
    return [*in_nftables(json.loads(listing)), *_in_legacy_tables()]


def in_nftables(listing: Mapping[str, Any]) -> list[Barrier]:
    """Read what `nft -j list ruleset` answers (libnftables-json(5))."""
    items: Sequence[Mapping[str, Any]] = listing.get("nftables", [])
    chains = [item["chain"] for item in items if "chain" in item]
    rules = [item["rule"] for item in items if "rule" in item]
    found = []
    for chain in chains:
        if chain.get("hook") not in _LOST or _OURS.fullmatch(chain["table"]):
            continue
        near = [rule for rule in rules if _table_of(rule) == _table_of(chain)]
        own = [rule["expr"] for rule in near if rule["chain"] == chain["name"]]
        let = _let_through(chain["hook"], (_as_words(rule["expr"]) for rule in near))
        if _ends_in_refusal(chain, own) and not let:
            names = frozenset(c["name"] for c in chains if _table_of(c) == _table_of(chain))
            found.append(_Chain(chain["hook"], *_table_of(chain), chain["name"], names))
    return [chain.barrier() for chain in found]


def _table_of(item: Mapping[str, Any]) -> tuple[str, str]:
    return item["family"], item["table"]


def in_legacy_tables(rules: str) -> list[Barrier]:
    """Read what `iptables-legacy -S` answers: rules as words for iptables(8)."""
    lines = rules.splitlines()
    siblings = frozenset(line.split()[1] for line in lines if line.startswith(("-P ", "-N ")))
    found = []
    for hook in _LOST:
        name = hook.upper()
        last = next((line for line in reversed(lines) if line.startswith(f"-A {name} ")), "")
        refuses = f"-P {name} DROP" in lines or re.fullmatch(rf"-A {name} -j (DROP|REJECT.*)", last)
        if refuses and not _let_through(hook, lines):
            chain = _Chain(hook, "ip", "filter", name, siblings, "iptables-legacy")
            found.append(chain.barrier())
    return found


def _in_legacy_tables() -> list[Barrier]:
    if not _LEGACY_TABLES.exists() or "filter" not in _LEGACY_TABLES.read_text().split():
        return []
    program = shutil.which("iptables-legacy", path=MINIMAL_ENVIRONMENT["PATH"])
    if program is None:
        seen = "rules of legacy iptables are loaded, which nobody can read without iptables-legacy"
        return [Barrier(seen, "apt-get install iptables, and ask again")]
    return in_legacy_tables(run([program, "-S"], timeout=_TIMEOUT).text)


def _ends_in_refusal(chain: Mapping[str, Any], rules: Sequence[list[Mapping[str, Any]]]) -> bool:
    if chain.get("policy") == "drop":
        return True
    last = [part for part in (rules[-1] if rules else []) if not {"counter", "log"} & part.keys()]
    # An extension of iptables that nftables has no words for is `xt`.
    extension = str(last[0].get("xt")) if last else ""
    return bool(last) and (bool({"drop", "reject"} & last[0].keys()) or "REJECT" in extension)


def _as_words(rule: Iterable[Mapping[str, Any]]) -> str:
    """A rule of nftables in the words of iptables(8), as far as they matter here."""
    return " ".join(_words(rule))


def _words(rule: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    for part in rule:
        match part:
            case {"match": {"left": {"meta": {"key": "iifname"}}, "right": str(name)}}:
                yield f"-i {name}"
            case {"match": {"left": {"meta": {"key": "oifname"}}, "right": str(name)}}:
                yield f"-o {name}"
            case {"accept": _}:
                yield "-j ACCEPT"


def _let_through(hook: str, rules: Iterable[str]) -> bool:
    """Whether somebody has let sandboxes through already: in, and out when forwarded."""
    accepting = [rule for rule in rules if "-j ACCEPT" in rule]
    ways = ("-i", "-o") if hook == "forward" else ("-i",)
    return all(any(f"{way} {_INTERFACES}" in rule for rule in accepting) for way in ways)

"""Find other firewall rules on this host (Docker's, ufw's, firewalld's) that block sandboxes.

A packet passes only if the chains of every table accept it, so if another table drops or rejects
by default, it needs a rule that accepts sandboxes; accepting in ours does not help. Rules are read
from nftables, which includes those of iptables-nft (Debian's iptables), and from iptables-legacy,
whose rules nftables does not show.
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
_CONSEQUENCES = {
    "forward": "drops forwarded packets: sandboxes with network open reach nothing",
    "input": "drops incoming packets: sandboxes with network restricted can't reach the proxy",
}
_AFTER_EACH_BOOT = " (and again after each boot of the machine)"
# The rules that accept sandboxes, in iptables(8) syntax.
_ACCEPT_RULES = {
    "forward": ("-i ork+ -j ACCEPT", "-o ork+ -j ACCEPT"),
    "input": (f"-i ork+ -p tcp --dport {PROXY_PORT} -j ACCEPT",),
}


@dataclass(frozen=True)
class Barrier:
    """A chain that blocks sandboxes: the consequence, and the commands that let them through."""

    problem: str
    remedy: str


@dataclass(frozen=True)
class _Chain:
    """A base chain that drops or rejects by default; `hook` in lower case."""

    hook: str
    family: str
    table: str
    name: str
    # The names of all chains of its table, which identify the program it belongs to.
    siblings: frozenset[str]
    program: str = "iptables"

    def barrier(self) -> Barrier:
        """Describe the chain."""
        whose, remedy = self._remedy()
        kind = "legacy iptables chain" if self.program == "iptables-legacy" else "the chain"
        where = f"{kind} {self.family} {self.table} {self.name}{whose}"
        return Barrier(f"{where} {_CONSEQUENCES[self.hook]}", remedy)

    def _remedy(self) -> tuple[str, str]:
        rules = _ACCEPT_RULES[self.hook]
        if "ufw-before-forward" in self.siblings:
            lines = " and ".join(f"`-A ufw-before-{self.hook} {rule}`" for rule in rules)
            return " (ufw)", f"put {lines} before COMMIT in /etc/ufw/before.rules; ufw reload"
        if self.table == "firewalld":
            add = "firewall-cmd --permanent --zone=trusted --add-interface=ork+"
            return " (firewalld)", f"{add} && firewall-cmd --reload"
        if self.hook == "forward" and "DOCKER-USER" in self.siblings:
            return " (Docker)", self._insert("DOCKER-USER") + _AFTER_EACH_BOOT
        if self.program == "iptables-legacy":
            return "", self._insert(self.name) + _AFTER_EACH_BOOT
        return "", self._insert_by_nft() + _AFTER_EACH_BOOT

    def _insert(self, chain: str) -> str:
        return " && ".join(f"{self.program} -I {chain} {rule}" for rule in _ACCEPT_RULES[self.hook])

    def _insert_by_nft(self) -> str:
        place = f"{self.family} {self.table} {self.name}"
        port = f" tcp dport {PROXY_PORT}" if self.hook == "input" else ""
        words = ("iifname", "oifname") if self.hook == "forward" else ("iifname",)
        return " && ".join(f"nft 'insert rule {place} {w} \"ork*\"{port} accept'" for w in words)


def find_barriers() -> list[Barrier]:
    """Return what blocks sandboxes on this host; raises CommandFailed, for instance if not root."""
    listing = run(["nft", "-j", "list", "ruleset"], timeout=_TIMEOUT).stdout or b"{}"
    return [*parse_nftables(json.loads(listing)), *_legacy_barriers()]


def parse_nftables(listing: Mapping[str, Any]) -> list[Barrier]:
    """Parse the output of `nft -j list ruleset` (libnftables-json(5))."""
    items: Sequence[Mapping[str, Any]] = listing.get("nftables", [])
    chains = [item["chain"] for item in items if "chain" in item]
    rules = [item["rule"] for item in items if "rule" in item]
    found = []
    for chain in chains:
        if chain.get("hook") not in _CONSEQUENCES or _OURS.fullmatch(chain["table"]):
            continue
        table_rules = [rule for rule in rules if _table_of(rule) == _table_of(chain)]
        own = [rule["expr"] for rule in table_rules if rule["chain"] == chain["name"]]
        accepted = _is_accepted(chain["hook"], (_as_iptables(rule["expr"]) for rule in table_rules))
        if _rejects_by_default(chain, own) and not accepted:
            names = frozenset(c["name"] for c in chains if _table_of(c) == _table_of(chain))
            found.append(_Chain(chain["hook"], *_table_of(chain), chain["name"], names))
    return [chain.barrier() for chain in found]


def _table_of(item: Mapping[str, Any]) -> tuple[str, str]:
    return item["family"], item["table"]


def parse_legacy_iptables(rules: str) -> list[Barrier]:
    """Parse the output of `iptables-legacy -S`: rules in iptables(8) syntax."""
    lines = rules.splitlines()
    siblings = frozenset(line.split()[1] for line in lines if line.startswith(("-P ", "-N ")))
    found = []
    for hook in _CONSEQUENCES:
        name = hook.upper()
        last = next((line for line in reversed(lines) if line.startswith(f"-A {name} ")), "")
        refuses = f"-P {name} DROP" in lines or re.fullmatch(rf"-A {name} -j (DROP|REJECT.*)", last)
        if refuses and not _is_accepted(hook, lines):
            chain = _Chain(hook, "ip", "filter", name, siblings, "iptables-legacy")
            found.append(chain.barrier())
    return found


def _legacy_barriers() -> list[Barrier]:
    if not _LEGACY_TABLES.exists() or "filter" not in _LEGACY_TABLES.read_text().split():
        return []
    program = shutil.which("iptables-legacy", path=MINIMAL_ENVIRONMENT["PATH"])
    if program is None:
        problem = "legacy iptables rules are loaded, which can't be read without iptables-legacy"
        return [Barrier(problem, "apt-get install iptables, then check again")]
    return parse_legacy_iptables(run([program, "-S"], timeout=_TIMEOUT).text)


def _rejects_by_default(chain: Mapping[str, Any], rules: Sequence[list[Mapping[str, Any]]]) -> bool:
    if chain.get("policy") == "drop":
        return True
    last = [part for part in (rules[-1] if rules else []) if not {"counter", "log"} & part.keys()]
    # An iptables extension that nftables cannot express is listed as `xt`.
    extension = str(last[0].get("xt")) if last else ""
    return bool(last) and (bool({"drop", "reject"} & last[0].keys()) or "REJECT" in extension)


def _as_iptables(rule: Iterable[Mapping[str, Any]]) -> str:
    """Return the relevant parts of an nftables rule in iptables(8) syntax."""
    return " ".join(_iptables_options(rule))


def _iptables_options(rule: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    for part in rule:
        match part:
            case {"match": {"left": {"meta": {"key": "iifname"}}, "right": str(name)}}:
                yield f"-i {name}"
            case {"match": {"left": {"meta": {"key": "oifname"}}, "right": str(name)}}:
                yield f"-o {name}"
            case {"accept": _}:
                yield "-j ACCEPT"


def _is_accepted(hook: str, rules: Iterable[str]) -> bool:
    """Whether the rules already accept sandboxes, for forwarding in both directions."""
    accepting = [rule for rule in rules if "-j ACCEPT" in rule]
    ways = ("-i", "-o") if hook == "forward" else ("-i",)
    return all(any(f"{way} {_INTERFACES}" in rule for rule in accepting) for way in ways)

"""The egress proxy's configuration file and refusal page, as text.

Squid decides nothing by itself: every request is put to the helper
(:mod:`hostruntime.egress_helper`), then the name's addresses are held against the deny list. The
addresses come from the cache the connection is made from, and its connections carry a mark by
which nftables drops what is denied, should they ever differ.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

from hostruntime.policy import Network

REFUSAL_PAGE = "ERR_ORKESTR_REFUSED"
# Squid expands %o to the helper's message, escaped for HTML (deny_info, errorpage macros).
REFUSAL_TEXT = "Refused by this sandbox's network policy: %o.\n"
# What Squid says when the policy allowed a host that then could not be reached: told apart from a
# refusal, and from anything the host itself might answer.
UNREACHABLE_PAGES = ("ERR_CANNOT_FORWARD", "ERR_DNS_FAIL", "ERR_CONNECT_FAIL")
UNREACHABLE_TEXT = "Allowed by the network policy, but %H could not be reached from this host.\n"
PAGES = {REFUSAL_PAGE: REFUSAL_TEXT, **dict.fromkeys(UNREACHABLE_PAGES, UNREACHABLE_TEXT)}
CONNECTIONS_PER_CONTAINER = 512


@dataclass(frozen=True)
class SquidPlan:
    """The values the configuration is made of; all paths are readable by user `proxy`."""

    address: str
    port: int
    directory: Path
    log_directory: Path
    helper_command: str
    denied: tuple[Network, ...]
    local_addresses: tuple[str, ...]
    resolvers: tuple[str, ...]
    mark: int


def squid_config(plan: SquidPlan) -> str:
    """Return squid.conf(5)."""
    return "\n".join((*_identity(plan), *_decisions(plan), *_behaviour(plan), ""))


def _identity(plan: SquidPlan) -> Iterable[str]:
    yield f"http_port {plan.address}:{plan.port}"
    yield "visible_hostname egress"
    yield "cache_effective_user proxy"
    yield f"pid_filename {plan.directory}/squid.pid"
    yield f"coredump_dir {plan.log_directory}"
    yield f"cache_log {plan.log_directory}/cache.log"
    yield "debug_options ALL,0"
    yield "access_log none"
    yield "logfile_rotate 0"
    yield f"error_directory {plan.directory}/errors"
    yield "httpd_suppress_version_string on"


def _decisions(plan: SquidPlan) -> Iterable[str]:
    # No answer is kept: a policy given or taken holds from the next request on.
    yield (
        "external_acl_type policy ttl=0 negative_ttl=0 cache=0 ipv4 concurrency=64 "
        "children-max=4 children-startup=1 children-idle=1 "
        f"%>a %>rm %>rd %>rP {plan.helper_command}"
    )
    yield "acl may_reach external policy decide"
    yield "acl may_use_address external policy address"
    yield "acl is_recorded external policy allow"
    for network in (*plan.denied, *(ip_address(text) for text in plan.local_addresses)):
        yield f"acl denied_address dst {network}"
    yield "acl refused http_status 403"
    yield f"acl too_many maxconn {CONNECTIONS_PER_CONTAINER}"
    yield "http_access deny manager"
    yield "http_access deny too_many"
    yield "http_access deny !may_reach"
    yield "http_access deny denied_address !may_use_address"
    yield "http_access allow is_recorded"
    yield "http_access deny all"
    for name in ("may_reach", "may_use_address", "is_recorded"):
        yield f"deny_info 403:{REFUSAL_PAGE} {name}"
    # Clients do not show the body of a refused CONNECT; some do show its headers.
    yield 'reply_header_add X-Orkestr-Egress "%\'{message}note" refused'
    for header in ("X-Squid-Error", "X-Cache", "X-Cache-Lookup"):
        yield f"reply_header_access {header} deny all"
    yield f"tcp_outgoing_mark {plan.mark:#x} all"


def _behaviour(plan: SquidPlan) -> Iterable[str]:
    if plan.resolvers:
        yield f"dns_nameservers {' '.join(plan.resolvers)}"
    yield "cache deny all"
    yield "cache_mem 8 MB"
    yield "memory_pools off"
    yield "max_filedescriptors 16384"
    yield "via off"
    yield "forwarded_for delete"
    yield "pinger_enable off"
    yield "half_closed_clients off"
    yield "connect_timeout 20 seconds"
    yield "forward_timeout 40 seconds"
    yield "shutdown_lifetime 0 seconds"

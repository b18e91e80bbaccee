"""The egress proxy's configuration file and refusal page, as text.

Squid makes no decisions itself: every request is passed to the helper
(:mod:`hostruntime.network.egress_helper`), then the name's addresses are checked against the deny
list. They come from the same cache that the connection uses; should they ever differ, nftables
drops what is denied by the mark of Squid's connections. The tunnel must then start with a TLS
ClientHello that names the same host; it is never decrypted.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

from hostruntime.host.patience import slowness
from hostruntime.network.policy import Network
from hostruntime.network.unreached import CONNECT_SECONDS

REFUSAL_PAGE = "ERR_ORKESTR_REFUSED"
# Squid expands %o to the helper's message, escaped for HTML (deny_info, errorpage macros).
REFUSAL_TEXT = "Refused by this sandbox's network policy: %o.\n"
# Squid's pages for an allowed host that could not be reached: distinct from a refusal, and from any
# response of the host itself.
UNREACHABLE_PAGES = ("ERR_CANNOT_FORWARD", "ERR_DNS_FAIL", "ERR_CONNECT_FAIL")
UNREACHABLE_TEXT = "Allowed by the network policy, but %H could not be reached from this host.\n"
NO_ADDRESS_PAGE = "ERR_ORKESTR_NO_ADDRESS"
NO_ADDRESS = "could not be reached from this host: its name has no address (DNS)"
NO_ADDRESS_TEXT = f"Allowed by the network policy, but %H {NO_ADDRESS}.\n"
TOO_MANY_PAGE = "ERR_ORKESTR_TOO_MANY"
TOO_MANY_TEXT = (
    "Refused by this sandbox's network policy: more than {most} connections at once; close some.\n"
)
CONNECTIONS_PER_CONTAINER = 512
# Squid counts a connection once it has sent a request, nftables from its first packet; connections
# between the two limits get an explanation, those above are reset.
SOCKETS_PER_CONTAINER = CONNECTIONS_PER_CONTAINER + 64
# A tunnel takes four: one on each side of each of the two ports. This suffices for 30 containers at
# their limits, or 16,000 tunnels in total.
DESCRIPTORS = 65_536
# The timeout for the first byte, and for the first byte in a tunnel. On a slow machine it is four
# or sixteen times as long, in coarse steps: any change restarts Squid, which closes tunnels.
FIRST_BYTE_SECONDS = 8 * 4 ** min(2, round(math.log(slowness(), 4)))
PAGES = {
    REFUSAL_PAGE: REFUSAL_TEXT,
    NO_ADDRESS_PAGE: NO_ADDRESS_TEXT,
    TOO_MANY_PAGE: TOO_MANY_TEXT.format(most=CONNECTIONS_PER_CONTAINER),
    **dict.fromkeys(UNREACHABLE_PAGES, UNREACHABLE_TEXT),
}
PEEK_CERTIFICATE = "peek.pem"
PEEK_PROBE = "peek.invalid"
TRAFFIC_LOG = "traffic.log"
# Tunnels that carried something other than TLS: the helper is not queried for those.
NOT_TLS_LOG = "not-tls.log"
# Allowed hosts without an address, and connections to allowed hosts that failed.
NO_ADDRESS_LOG = "no-address.log"
BROKEN_LOG = "broken.log"
LOGS = (TRAFFIC_LOG, NOT_TLS_LOG, NO_ADDRESS_LOG, BROKEN_LOG)
OWNER_HEADER = "X-Orkestr-Owner"


@dataclass(frozen=True)
class SquidPlan:
    """The configuration's parameters; all paths are readable by user `proxy`."""

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
    parts = (_identity, _stages, _logs, _decisions, _hello, _behaviour)
    return "\n".join((*(line for part in parts for line in part(plan)), ""))


def _identity(plan: SquidPlan) -> Iterable[str]:
    yield f"http_port {plan.address}:{plan.port} name=ask"
    # The certificate is never presented, but Squid cannot peek on a port without one.
    yield (
        f"http_port {plan.address}:{plan.port + 1} name=peek ssl-bump "
        f"generate-host-certificates=off tls-cert={plan.directory}/{PEEK_CERTIFICATE}"
    )
    yield "visible_hostname egress"
    yield "cache_effective_user proxy"
    yield f"pid_filename {plan.directory}/squid.pid"
    yield f"coredump_dir {plan.log_directory}"
    yield f"cache_log {plan.log_directory}/cache.log"
    yield "debug_options ALL,0"
    yield "logfile_rotate 1"
    yield f"error_directory {plan.directory}/errors"
    yield "httpd_suppress_version_string on"


def _stages(plan: SquidPlan) -> Iterable[str]:
    """Configure two stages in one process: the first port forwards requests to the second.

    A port that peeks into tunnels cannot refuse one legibly: the message would be inside TLS, with
    its own certificate. So the first port refuses, in plain HTTP, and only the second peeks.
    """
    yield "acl asked myportname ask"
    yield "acl peeked myportname peek"
    yield f"acl ourselves src {plan.address}"
    yield f"acl probe dstdomain {PEEK_PROBE}"
    yield (
        f"cache_peer {plan.address} parent {plan.port + 1} 0 no-query no-digest "
        "no-netdb-exchange proxy-only connect-fail-limit=1000000 name=peek"
    )
    yield "never_direct allow asked"
    yield "always_direct allow peeked"
    # Only the first port tells the second which container a tunnel belongs to.
    yield "forwarded_for truncate"


def _logs(plan: SquidPlan) -> Iterable[str]:
    """Log traffic, tunnels without TLS, and allowed hosts that could not be reached."""
    yield (
        'logformat traffic {"at":%ts.%03tu,"owner":"%et","host":"%>rd","via":"%<lp",'
        '"sent":%>st,"received":%<st}'
    )
    yield "acl tunnelled http_status 200"
    yield f"access_log stdio:{plan.log_directory}/{TRAFFIC_LOG} traffic asked tunnelled !probe"
    # The first port tells the second which container a tunnel belongs to; clients cannot set this.
    yield f"request_header_access {OWNER_HEADER} deny all"
    yield f'request_header_add {OWNER_HEADER} "%et" asked'
    yield (
        f'logformat not_tls {{"at":%ts.%03tu,"owner":"%{{{OWNER_HEADER}}}>ha",'
        '"address":"%{X-Forwarded-For}>ha","host":"%>rd","port":%>rP}'
    )
    yield "acl is_not_tls squid_error ERR_PROTOCOL_UNKNOWN"
    yield f"access_log stdio:{plan.log_directory}/{NOT_TLS_LOG} not_tls peeked is_not_tls"
    yield (
        'logformat no_address {"at":%ts.%03tu,"owner":"%et","host":"%>rd","port":%>rP,'
        '"error":"%err_code"}'
    )
    yield "acl unavailable http_status 503"
    yield (
        f"access_log stdio:{plan.log_directory}/{NO_ADDRESS_LOG} no_address asked unavailable "
        "!probe"
    )
    yield ('logformat broken {"at":%ts.%03tu,"via":"%>p","host":"%>rd","status":%>Hs,"ms":%tr}')
    # One line per tunnel: a failure inside has no status that an ACL could match.
    yield "acl went_well http_status 200"
    yield f"access_log stdio:{plan.log_directory}/{BROKEN_LOG} broken peeked !went_well !probe"
    yield "access_log none"


def _decisions(plan: SquidPlan) -> Iterable[str]:
    # Do not cache verdicts: a policy change applies from the next request on.
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
    yield f"deny_info 403:{TOO_MANY_PAGE} too_many"
    yield "acl resolves dst all"
    yield f"deny_info 503:{NO_ADDRESS_PAGE} resolves"
    yield "acl refused http_status 403"
    yield f"acl too_many maxconn {CONNECTIONS_PER_CONTAINER}"
    yield "http_access deny manager"
    yield "http_access allow peeked ourselves"
    yield "http_access deny peeked"
    yield "http_access allow ourselves probe"
    yield "http_access deny too_many"
    yield "http_access deny !may_reach"
    yield "http_access deny denied_address !may_use_address"
    yield "http_access deny !resolves"
    yield "http_access allow is_recorded"
    yield "http_access deny all"
    for name in ("may_reach", "may_use_address", "is_recorded"):
        yield f"deny_info 403:{REFUSAL_PAGE} {name}"
    # Clients do not display the body of a refused CONNECT; some display its headers.
    yield 'reply_header_add X-Orkestr-Egress "%\'{message}note" refused'
    yield f'reply_header_add X-Orkestr-Egress "allowed, but {NO_ADDRESS}" unavailable'
    for header in ("X-Squid-Error", "X-Cache", "X-Cache-Lookup"):
        yield f"reply_header_access {header} deny all"
    yield f"tcp_outgoing_mark {plan.mark:#x} peeked"


def _hello(plan: SquidPlan) -> Iterable[str]:
    """Check the name in the TLS ClientHello (SNI, RFC 6066) against the requested one."""
    yield (
        "external_acl_type hello ttl=0 negative_ttl=0 cache=0 ipv4 concurrency=64 "
        "children-max=4 children-startup=1 children-idle=1 "
        f"%{{X-Forwarded-For}}>ha %>rm %>rd %>rP %ssl::>sni {plan.helper_command}"
    )
    yield "acl at_request at_step SslBump1"
    yield "acl hello_matches external hello hello"
    yield "ssl_bump peek at_request"
    yield "ssl_bump splice hello_matches"
    yield "ssl_bump terminate all"


def _behaviour(plan: SquidPlan) -> Iterable[str]:
    if plan.resolvers:
        yield f"dns_nameservers {' '.join(plan.resolvers)}"
    yield "cache deny all"
    yield "cache_mem 8 MB"
    yield "memory_pools off"
    yield f"max_filedescriptors {DESCRIPTORS}"
    yield "via off"
    yield "pinger_enable off"
    yield "half_closed_clients off"
    yield f"request_start_timeout {FIRST_BYTE_SECONDS} seconds"
    yield "request_timeout 30 seconds"
    yield "client_idle_pconn_timeout 30 seconds"
    yield f"connect_timeout {CONNECT_SECONDS} seconds"
    yield "forward_timeout 40 seconds"
    yield "shutdown_lifetime 0 seconds"

"""The egress proxy: one Squid per instance, the only way out of a restricted container.

Squid daemonizes, so it and its decisions outlive the agent; a starting agent adopts a running
Squid if its configuration is current, and replaces it otherwise. It fails closed: without a proxy
or helper, restricted containers have no other route.
"""

from __future__ import annotations

import json
import os
import pwd
import shutil
import signal
import socket
import sys
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import hostruntime
from hostruntime.errors import HostUnavailable
from hostruntime.host.paths import Instance, StatePaths
from hostruntime.host.patience import Patience
from hostruntime.host.run import CommandFailed, run
from hostruntime.host.writing import write_atomically
from hostruntime.network import policy, registries
from hostruntime.network.egress_log import read_entries
from hostruntime.network.firewall import proxy_mark
from hostruntime.network.policy import NO_POLICY
from hostruntime.network.settings import NetworkSettings
from hostruntime.network.slots import SlotPool
from hostruntime.network.squid_config import (
    BROKEN_LOG,
    DESCRIPTORS,
    LOGS,
    NO_ADDRESS_LOG,
    NO_ADDRESS_PAGE,
    NOT_TLS_LOG,
    PAGES,
    PEEK_CERTIFICATE,
    PEEK_PROBE,
    TRAFFIC_LOG,
    SquidPlan,
    squid_config,
)
from hostruntime.network.squid_log import error_summary
from hostruntime.network.unreached import UnreachedHost, failed_tunnels, unresolved_hosts
from hostruntime.wire.health import EgressDecision, EgressHost
from hostruntime.wire.message import MalformedError, from_fields

PROXY_USER = "proxy"
_START_SECONDS = 15.0
_STOP_SECONDS = 5.0
_PROBE_SECONDS = 3.0
_MAX_RESPONSE_BYTES = 8192
_POLL_SECONDS = 0.02
_CUT_MATCH_SECONDS = 15.0
_MAX_LOG_BYTES = 8 * 1024 * 1024
_DECISION_RETENTION_SECONDS = 7 * 86_400.0
# Includes the enclosing packages, so that the module names are the same.
_PACKAGED = ("__init__.py", "network/__init__.py", "network/policy.py", "network/egress_helper.py")
_HELPER_MAIN = """\
import sys
from hostruntime.network.egress_helper import main
main(sys.argv[1:])
"""
# Squid requires a file for every error page, though this proxy shows only its own.
_SQUID_PAGES = Path("/usr/share/squid/errors/templates")
_ALLOWLIST = Path(__file__).with_name("data") / "egress-allowlist.txt"


@dataclass(frozen=True)
class Traffic:
    """Traffic of closed tunnels to one host: their number, and the bytes each way."""

    tunnels: int
    sent: int
    received: int

    def add_tunnel(self, sent: int, received: int) -> Traffic:
        """Return the sum with one more tunnel."""
        return Traffic(self.tunnels + 1, self.sent + sent, self.received + received)


class EgressProxy:
    """Squid under the agent's control."""

    def __init__(self, paths: StatePaths, instance: Instance, pool: SlotPool) -> None:
        self.paths = paths
        self.instance = instance
        self.pool = pool
        self.run_dir = pool.run_dir
        self._config = self.run_dir.egress / "squid.conf"

    def start(self) -> None:
        """Serve with the current configuration: adopt, replace or start Squid.

        Raises HostUnavailable if it does not start, PolicyError for a malformed allowlist.
        """
        self._write_defaults()
        changed = self._write_files()
        if not changed and self.healthy():
            return
        self.stop()
        self._launch()

    def refresh(self) -> None:
        """Query the package managers again; takes effect immediately, without a restart.

        For when their answers change, as when the node base provides the first npm. Raises
        PolicyError for a malformed allowlist.
        """
        registries.clear_cache()
        self._write_defaults()

    def stop(self) -> None:
        """Stop Squid; idempotent. Closes open tunnels."""
        for sent, patience in ((signal.SIGTERM, _STOP_SECONDS), (signal.SIGKILL, _STOP_SECONDS)):
            for pid in self.processes():
                _kill(pid, sent)
            ending = Patience(patience, self.processes)
            while self.processes() and not ending.exhausted():
                time.sleep(_POLL_SECONDS)
        # They exit with Squid, unless they hang.
        for pid in self.helpers():
            _kill(pid, signal.SIGKILL)

    def ensure(self) -> None:
        """Restart Squid if it does not respond. Raises HostUnavailable."""
        if not self.healthy():
            self.stop()
            self._launch()
        self._rotate()

    def _rotate(self) -> None:
        logs = [self.run_dir.egress / "log" / name for name in LOGS]
        if any(log.exists() and log.stat().st_size > _MAX_LOG_BYTES for log in logs):
            run([_squid(), "-k", "rotate", "-f", str(self._config)], timeout=_START_SECONDS)

    def healthy(self) -> bool:
        """Whether Squid and its helper respond: they must refuse a probe request.

        Squid's master process must be alive, too: the worker would keep serving without it, but
        would not be restarted, nor rotate its logs (squid(8), `-k`).
        """
        try:
            return self._has_master() and self._helper_refuses() and self._reaches_peek_port()
        except OSError:
            return False

    def _has_master(self) -> bool:
        text = (self.run_dir.egress / "squid.pid").read_text().strip()
        # Not among all processes: sandboxes may have thousands.
        is_ours = text.isdecimal() and _pid_namespace(text) == _pid_namespace("self")
        return is_ours and self._has_our_config(int(text))

    def _helper_refuses(self) -> bool:
        # Squid would also refuse with a dead helper; this message comes from the helper.
        return self._response_contains("probe.invalid", NO_POLICY.encode())

    def _reaches_peek_port(self) -> bool:
        """Whether the first port reaches the second; after a start, Squid takes a second."""
        return self._response_contains(PEEK_PROBE, b" 200 ")

    def _response_contains(self, host: str, words: bytes) -> bool:
        """Whether the response to a CONNECT starts with text that contains ``words``.

        Waits as long as Squid and its helpers make progress: a busy machine is no reason to
        restart them, which closes every tunnel. Raises OSError.
        """
        patience = Patience(_PROBE_SECONDS, lambda: [*self.processes(), *self.helpers()])
        response = b""
        with socket.create_connection(self.pool.proxy_address(), _PROBE_SECONDS) as probe:
            probe.settimeout(patience.poll_interval)
            probe.sendall(f"CONNECT {host}:443 HTTP/1.0\r\n\r\n".encode())
            while words not in response and len(response) < _MAX_RESPONSE_BYTES:
                try:
                    chunk = probe.recv(_MAX_RESPONSE_BYTES)
                except TimeoutError:
                    if patience.exhausted():
                        raise
                    continue
                if not chunk:
                    break
                response += chunk
        return words in response

    def hosts(self, owner: str) -> list[EgressHost]:
        """Return an owner's requests and their results by host, failures first."""
        found: dict[tuple[str, int], list[EgressDecision]] = {}
        for decision in self.decisions(owner):
            found.setdefault((decision.host, decision.port), []).append(decision)
        traffic = self.traffic(owner)
        no_traffic = Traffic(0, 0, 0)
        uses = [
            EgressHost(
                host=host,
                port=port,
                allowed=sum(entry.verdict == "allowed" for entry in decisions),
                refused=sum(entry.verdict == "refused" for entry in decisions),
                reason=decisions[-1].reason,
                message=decisions[-1].message,
                last_at=decisions[-1].at,
                # Only TLS on its own port is ever let through.
                sent_bytes=traffic.get(host, no_traffic).sent if port == policy.TLS_PORT else 0,
                received_bytes=traffic.get(host, no_traffic).received
                if port == policy.TLS_PORT
                else 0,
                unreached=sum(entry.verdict == "unreached" for entry in decisions),
                direct=decisions[-1].direct,
            )
            for (host, port), decisions in found.items()
        ]
        return sorted(uses, key=lambda use: (not use.refused, not use.unreached, -use.last_at))

    def traffic(self, owner: str) -> dict[str, Traffic]:
        """Return the traffic of an owner's closed tunnels, by host."""
        found: dict[str, Traffic] = {}
        for entry in self._log_entries(TRAFFIC_LOG, owner):
            known = found.get(entry["host"], Traffic(0, 0, 0))
            found[entry["host"]] = known.add_tunnel(entry["sent"], entry["received"])
        return found

    def decisions(self, owner: str, since: float = 0.0) -> list[EgressDecision]:
        """Return the decisions on an owner's requests since `since` (Unix seconds), oldest first.

        Reads files, so do not call it in an event loop.
        """
        if "/" in owner:
            return []
        found = self._recorded(owner, since)
        refused = [entry for entry in found if entry.reason in policy.CUT_REASONS]
        found += [
            _unreached_decision(owner, entry)
            for entry in self._unreached(owner, since)
            # A tunnel cut by the policy also looks like a failed one.
            if not any(
                cut.host == entry.host and abs(cut.at - entry.at) < _CUT_MATCH_SECONDS
                for cut in refused
            )
        ]
        return sorted(found, key=lambda decision: decision.at)

    def refusals(self, owner: str, since: float) -> list[EgressDecision]:
        """Return only what was refused, at less cost: no look at what failed for other reasons.

        Reads files, so do not call it in an event loop.
        """
        found = [one for one in self._recorded(owner, since) if one.verdict == "refused"]
        return sorted(found, key=lambda decision: decision.at)

    def _recorded(self, owner: str, since: float) -> list[EgressDecision]:
        self.pool.record_attempts(owner)
        entries = [
            _parse_decision(entry)
            for record in (self.run_dir.decisions, self.run_dir.direct)
            for entry in read_entries(record / f"{owner}.ndjson", owner, since)
        ]
        not_tls = map(_not_tls_decision, self._log_entries(NOT_TLS_LOG, owner, since))
        return [*(entry for entry in entries if entry is not None), *not_tls]

    def _unreached(self, owner: str, since: float) -> list[UnreachedHost]:
        named = [
            entry
            for entry in self._log_entries(NO_ADDRESS_LOG, owner, since)
            if str(entry.get("error", "")).endswith(NO_ADDRESS_PAGE)
        ]
        tunnels = list(self._log_entries(TRAFFIC_LOG, owner, since))
        # Only the tunnel, which is logged when it closes, says whose failure it was.
        failures = (
            self._log_entries(BROKEN_LOG, None, since - _CUT_MATCH_SECONDS) if tunnels else ()
        )
        return [*unresolved_hosts(named), *failed_tunnels(tunnels, failures)]

    def _log_entries(
        self, name: str, owner: str | None, since: float = 0.0
    ) -> Iterator[dict[str, Any]]:
        """Yield the entries of an owner, or of all, in one of Squid's logs, oldest first."""
        for path in sorted((self.run_dir.egress / "log").glob(f"{name}*"), reverse=True):
            yield from read_entries(path, owner, since)

    # Files --------------------------------------------------------------------------------

    def _write_defaults(self) -> None:
        record = {"domains": default_domains(self.paths)}
        write_atomically(self.run_dir.defaults, json.dumps(record).encode(), 0o640)

    def _write_files(self) -> bool:
        """Write the files that Squid reads; return whether any has changed."""
        egress = self.run_dir.egress
        _directory(egress / "errors", "root", 0o750)
        for page in _SQUID_PAGES.iterdir():
            if page.name not in PAGES:
                shutil.copyfile(page, egress / "errors" / page.name)
        _directory(egress / "log", PROXY_USER, 0o700)
        _make_certificate(egress / PEEK_CERTIFICATE)
        _directory(self.run_dir.decisions, PROXY_USER, 0o700)
        self._delete_old_decisions()
        files = {
            **{egress / "errors" / page: text.encode() for page, text in PAGES.items()},
            egress / "helper.pyz": _helper_archive(),
            self._config: squid_config(self._plan()).encode(),
        }
        changed = [path for path, data in files.items() if not _has_content(path, data)]
        for path in changed:
            write_atomically(path, files[path], 0o640)
        return bool(changed)

    def _plan(self) -> SquidPlan:
        address, port = self.pool.proxy_address()
        egress = self.run_dir.egress
        return SquidPlan(
            address=address,
            port=port,
            directory=egress,
            log_directory=egress / "log",
            helper_command=f"{_helper_python()} -I -S {egress}/helper.pyz {egress}",
            denied=self.pool.settings.denied,
            local_addresses=_local_addresses(self.pool.settings),
            resolvers=self.pool.settings.resolvers,
            mark=proxy_mark(self.instance.index),
        )

    def _delete_old_decisions(self) -> None:
        oldest = time.time() - _DECISION_RETENTION_SECONDS
        records = (self.run_dir.decisions, self.run_dir.direct)
        for path in (path for record in records for path in record.glob("*.ndjson")):
            if path.stat().st_mtime < oldest:
                path.unlink(missing_ok=True)

    # Process ------------------------------------------------------------------------------

    def _launch(self) -> None:
        # A killed Squid leaves its pid file, and a new one would believe it to be running.
        (self.run_dir.egress / "squid.pid").unlink(missing_ok=True)
        log = self.run_dir.egress / "log" / "cache.log"
        earlier = log.stat().st_size if log.exists() else 0
        try:
            run([*_launch_prefix(), _squid(), "-f", str(self._config)], timeout=_START_SECONDS)
        except CommandFailed as error:
            why = error_summary(error.output.decode(errors="replace")) or error.detail
            raise HostUnavailable(f"The egress proxy does not start. {why}") from error
        patience = Patience(_START_SECONDS, lambda: [*self.processes(), *self.helpers()])
        while not self.healthy():
            if patience.exhausted():
                why = error_summary(_read_from(log, earlier))
                raise HostUnavailable(
                    f"The egress proxy does not answer; it {patience.reason}. {why}"
                )
            time.sleep(_POLL_SECONDS)

    def processes(self) -> list[int]:
        """Return this instance's Squid processes: those with our configuration file."""
        return [pid for pid in _pids() if self._has_our_config(pid)]

    def _has_our_config(self, pid: int) -> bool:
        return os.fsencode(self._config) in _command_line(pid).split(b"\0")

    def helpers(self) -> list[int]:
        """Return the helper processes."""
        wanted = os.fsencode(self.run_dir.egress / "helper.pyz")
        return [pid for pid in _pids() if wanted in _command_line(pid).split(b"\0")]


def proxy_problems() -> list[str]:
    """Return sentences describing what would prevent the proxy from running on this host."""
    found: list[str] = []
    for ask in (_squid, _helper_python):
        try:
            ask()
        except HostUnavailable as error:
            found.append(error.detail)
    profiles = Path("/sys/kernel/security/apparmor/profiles")
    if profiles.exists() and "/usr/sbin/squid (enforce)" in profiles.read_text():
        found.append(
            "AppArmor confines Squid to its Debian configuration, so the egress proxy cannot read "
            "its own: run `aa-disable usr.sbin.squid`, or allow /run/orkestr/** in its profile."
        )
    return found


def default_domains(paths: StatePaths) -> list[str]:
    """Return the default allowlist: the data file, the operator's, the host's registries.

    Raises PolicyError for a malformed file, OSError for a missing ORKESTR_EGRESS_ALLOWLIST.
    """
    files = [_ALLOWLIST]
    if (own := paths.root / "egress-allowlist.txt").exists():
        files.append(own)
    if named := os.environ.get("ORKESTR_EGRESS_ALLOWLIST"):
        files.append(Path(named))
    listed = [domain for file in files for domain in policy.parse_domain_list(file.read_text())]
    return sorted({*listed, *host_registries(paths).domains})


def host_registries(paths: StatePaths) -> registries.Registries:
    """Return the host's registries, with npm's from the node base if the host has no npm."""
    return registries.host_registries(paths.images / "node-22" / "tree")


def _parse_decision(entry: dict[str, Any]) -> EgressDecision | None:
    try:
        return from_fields(EgressDecision, entry)
    except MalformedError:
        return None


def _not_tls_decision(entry: dict[str, Any]) -> EgressDecision:
    verdict = policy.not_tls_verdict(entry["host"])
    return EgressDecision(
        at=entry["at"],
        owner=entry["owner"],
        host=entry["host"],
        port=entry["port"],
        verdict="refused",
        reason=verdict.reason,
        address=entry["address"],
        method="CONNECT",
        message=verdict.message,
    )


def _unreached_decision(owner: str, entry: UnreachedHost) -> EgressDecision:
    return EgressDecision(
        at=entry.at,
        owner=owner,
        host=entry.host,
        port=entry.port,
        verdict="unreached",
        reason=entry.reason,
        method="CONNECT",
        message=entry.message,
    )


def _make_certificate(path: Path) -> None:
    """Write a self-signed certificate with its key, unless there is one."""
    if path.exists():
        return
    key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    out = ["-days", "7300", "-subj", "/CN=egress", "-keyout", "-", "-out", "-"]
    certificate = run(["openssl", "req", "-x509", *key, *out], timeout=_START_SECONDS)
    write_atomically(path, certificate.stdout, 0o640)


def _helper_archive() -> bytes:
    """Return the helper as a runnable zip; reproducible from the same sources."""
    package = Path(hostruntime.__file__).parent
    members = {f"hostruntime/{name}": (package / name).read_bytes() for name in _PACKAGED}
    members["__main__.py"] = _HELPER_MAIN.encode()
    buffer = BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in members.items():
            archive.writestr(zipfile.ZipInfo(name), data)
    return buffer.getvalue()


def _helper_python() -> str:
    """Return a Python ≥ 3.10 that user `proxy` can run; the agent's own may be under /root."""
    check = "import sys; sys.exit(sys.version_info < (3, 10))"
    drop = ("setpriv", f"--reuid={PROXY_USER}", f"--regid={PROXY_USER}", "--clear-groups", "--")
    for python in ("/usr/bin/python3", "/usr/local/bin/python3", str(Path(sys.executable))):
        try:
            run([*drop, python, "-I", "-S", "-c", check], timeout=_START_SECONDS)
        except CommandFailed:
            continue
        return python
    raise HostUnavailable(
        f"The egress proxy needs a Python 3.10 or later that user {PROXY_USER} can run; "
        "install the package python3."
    )


def _squid() -> str:
    found = shutil.which("squid", path="/usr/sbin:/usr/local/sbin:/usr/bin")
    if found is None:
        raise HostUnavailable("The egress proxy is missing; install the package squid-openssl.")
    return found


def _launch_prefix() -> tuple[str, ...]:
    """Return the command prefix that raises Squid's descriptor limit and resets its OOM score.

    Without CAP_SYS_RESOURCE (in a container) the limit cannot be raised and stays as it is. The
    OOM score is inherited from the agent, but the kernel need not spare Squid (choom(1)): tenants
    can make it use memory, and it is restarted.
    """
    wanted = (
        ("choom", "-n", "0", "--"),
        ("prlimit", f"--nofile={DESCRIPTORS}:{DESCRIPTORS}", "--"),
    )
    return tuple(word for prefix in wanted if _can_run(prefix) for word in prefix)


def _can_run(prefix: tuple[str, ...]) -> bool:
    try:
        run([*prefix, "true"], timeout=_START_SECONDS)
    except CommandFailed:
        return False
    return True


def _local_addresses(settings: NetworkSettings) -> tuple[str, ...]:
    """Return the host's addresses, which names must not resolve to, except permitted ones."""
    listing = json.loads(run(["ip", "-j", "address"], timeout=_START_SECONDS).stdout)
    texts = {info["local"] for link in listing for info in link.get("addr_info", [])}
    known = (*settings.denied, *settings.permitted)
    return tuple(sorted(t for t in texts if not policy.is_denied(ip_address(t), known)))


def _read_from(log: Path, offset: int) -> str:
    """Return the text in a log after its first ``offset`` bytes."""
    if not log.exists():
        return ""
    with log.open("rb") as file:
        file.seek(offset)
        return file.read().decode(errors="replace")


def _directory(path: Path, user: str, mode: int) -> None:
    proxy = pwd.getpwnam(PROXY_USER)
    path.mkdir(exist_ok=True)
    os.chown(path, proxy.pw_uid if user == PROXY_USER else 0, proxy.pw_gid)
    path.chmod(mode | 0o2000)


def _has_content(path: Path, data: bytes) -> bool:
    return path.exists() and path.read_bytes() == data


def _pids() -> list[int]:
    """Return the processes in the host's pid namespace: containers can fake command lines."""
    own = _pid_namespace("self")
    found = (entry.name for entry in Path("/proc").iterdir() if entry.name.isdigit())
    return [int(pid) for pid in found if _pid_namespace(pid) == own]


def _pid_namespace(pid: str) -> str | None:
    try:
        return str(Path(f"/proc/{pid}/ns/pid").readlink())
    except OSError:
        return None


def _command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def _kill(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return

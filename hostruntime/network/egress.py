"""The egress proxy: one Squid per instance, the only way out of a restricted container.

Squid detaches itself, so it and its decisions outlive the agent; a starting agent adopts the one
that runs if its configuration is the one it would write, and replaces it otherwise. A proxy or
helper that is gone means refused, never let through: restricted containers have no other route.
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
from hostruntime.host.paths import Instance, StatePaths, write_atomically
from hostruntime.host.patience import Patience
from hostruntime.host.run import CommandFailed, run
from hostruntime.network import policy, registries
from hostruntime.network.egress_log import entries_of
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
from hostruntime.network.squid_log import telling_lines
from hostruntime.network.unreached import Unreached, broken_tunnels, without_address
from hostruntime.wire.health import EgressDecision, EgressHost
from hostruntime.wire.message import MalformedError, from_fields

PROXY_USER = "proxy"
_START_SECONDS = 15.0
_STOP_SECONDS = 5.0
_PROBE_SECONDS = 3.0
_MOST_OF_AN_ANSWER = 8192
_POLL_SECONDS = 0.02
_CUT_SECONDS = 15.0
_MAX_LOG_BYTES = 8 * 1024 * 1024
_KEEP_DECISIONS_SECONDS = 7 * 86_400.0
# The packages they are in come along, so that they are imported by the same names.
_PACKAGED = ("__init__.py", "network/__init__.py", "network/policy.py", "network/egress_helper.py")
_HELPER_MAIN = """\
import sys
from hostruntime.network.egress_helper import main
main(sys.argv[1:])
"""
# Squid wants a file for every page it could show, though these proxies show but one.
_SQUID_PAGES = Path("/usr/share/squid/errors/templates")
_ALLOWLIST = Path(__file__).with_name("data") / "egress-allowlist.txt"


@dataclass(frozen=True)
class Traffic:
    """What tunnels to one host carried: how many ended, and bytes each way."""

    tunnels: int
    sent: int
    received: int

    def plus(self, sent: int, received: int) -> Traffic:
        """The same and one more tunnel."""
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
        """Serve with today's configuration: adopt, replace or start Squid.

        Raises HostUnavailable when it does not come up, PolicyError for a malformed allowlist.
        """
        self._write_defaults()
        changed = self._write_parts()
        if not changed and self.healthy():
            return
        self.stop()
        self._launch()

    def refresh(self) -> None:
        """Ask the package managers again; holds from the next request on, without a restart.

        For when the host's answers change, as when the node base brings the first npm. Raises
        PolicyError for a malformed allowlist.
        """
        registries.forget()
        self._write_defaults()

    def stop(self) -> None:
        """End Squid; idempotent. Open tunnels are cut."""
        for sent, patience in ((signal.SIGTERM, _STOP_SECONDS), (signal.SIGKILL, _STOP_SECONDS)):
            for pid in self.processes():
                _send(pid, sent)
            ending = Patience(patience, self.processes)
            while self.processes() and not ending.exhausted():
                time.sleep(_POLL_SECONDS)
        # They end with Squid by themselves, but not when they hang.
        for pid in self.helpers():
            _send(pid, signal.SIGKILL)

    def ensure(self) -> None:
        """Start it again if it does not answer. Raises HostUnavailable."""
        if not self.healthy():
            self.stop()
            self._launch()
        self._rotate()

    def _rotate(self) -> None:
        logs = [self.run_dir.egress / "log" / name for name in LOGS]
        if any(log.exists() and log.stat().st_size > _MAX_LOG_BYTES for log in logs):
            run([_squid(), "-k", "rotate", "-f", str(self._config)], timeout=_START_SECONDS)

    def healthy(self) -> bool:
        """Tell whether Squid and its helper answer: a request of ours must be refused by both.

        And whether Squid's master lives: the process that serves would go on without it, but
        nobody would start it again, nor have it rotate its logs (squid(8), `-k`).
        """
        try:
            return self._has_master() and self._refuses() and self._passes_on()
        except OSError:
            return False

    def _has_master(self) -> bool:
        text = (self.run_dir.egress / "squid.pid").read_text().strip()
        return text.isdecimal() and int(text) in self.processes()

    def _refuses(self) -> bool:
        # Squid would also refuse with a dead helper; these are the helper's own words.
        return self._says("probe.invalid", NO_POLICY.encode())

    def _passes_on(self) -> bool:
        """Tell whether the first port reaches the second, as Squid first doubts for a second."""
        return self._says(PEEK_PROBE, b" 200 ")

    def _says(self, host: str, words: bytes) -> bool:
        """Tell whether these are in the beginning of the answer to a CONNECT.  Raises OSError.

        Squid and helpers that are at work on it are waited for: a busy machine is no reason to
        start them anew, which cuts every tunnel.
        """
        patience = Patience(_PROBE_SECONDS, lambda: [*self.processes(), *self.helpers()])
        answer = b""
        with socket.create_connection(self.pool.proxy_address(), _PROBE_SECONDS) as probe:
            probe.settimeout(patience.poll_interval)
            probe.sendall(f"CONNECT {host}:443 HTTP/1.0\r\n\r\n".encode())
            while words not in answer and len(answer) < _MOST_OF_AN_ANSWER:
                try:
                    piece = probe.recv(_MOST_OF_AN_ANSWER)
                except TimeoutError:
                    if patience.exhausted():
                        raise
                    continue
                if not piece:
                    break
                answer += piece
        return words in answer

    def hosts(self, owner: str) -> list[EgressHost]:
        """Return what an owner asked for and what came of it by host, what failed first."""
        found: dict[tuple[str, int], list[EgressDecision]] = {}
        for decision in self.decisions(owner):
            found.setdefault((decision.host, decision.port), []).append(decision)
        carried = self.traffic(owner)
        nothing = Traffic(0, 0, 0)
        uses = [
            EgressHost(
                host=host,
                port=port,
                allowed=sum(one.verdict == "allowed" for one in decisions),
                refused=sum(one.verdict == "refused" for one in decisions),
                reason=decisions[-1].reason,
                message=decisions[-1].message,
                last_at=decisions[-1].at,
                # Nothing but TLS on its own port is ever carried.
                sent_bytes=carried.get(host, nothing).sent if port == policy.TLS_PORT else 0,
                received_bytes=carried.get(host, nothing).received
                if port == policy.TLS_PORT
                else 0,
                unreached=sum(one.verdict == "unreached" for one in decisions),
                direct=decisions[-1].direct,
            )
            for (host, port), decisions in found.items()
        ]
        return sorted(uses, key=lambda use: (not use.refused, not use.unreached, -use.last_at))

    def traffic(self, owner: str) -> dict[str, Traffic]:
        """Return what an owner's ended tunnels carried, by host."""
        found: dict[str, Traffic] = {}
        for entry in self._logged(TRAFFIC_LOG, owner):
            known = found.get(entry["host"], Traffic(0, 0, 0))
            found[entry["host"]] = known.plus(entry["sent"], entry["received"])
        return found

    def decisions(self, owner: str, since: float = 0.0) -> list[EgressDecision]:
        """Return what an owner's container asked for and was answered, oldest first.

        Reads files, as far back as `since` (Unix seconds): not for an event loop.
        """
        if "/" in owner:
            return []
        self.pool.record_attempts(owner)
        records = (self.run_dir.decisions, self.run_dir.direct)
        found = [
            _decision(entry)
            for record in records
            for entry in entries_of(record / f"{owner}.ndjson", owner, since)
        ]
        found += [_not_tls(entry) for entry in self._logged(NOT_TLS_LOG, owner, since)]
        refused = [one for one in found if one is not None and one.reason in policy.CUT]
        found += [
            _came_to_nothing(owner, one)
            for one in self._unreached(owner, since)
            # A tunnel that the policy cut looks like one that failed.
            if not any(
                cut.host == one.host and abs(cut.at - one.at) < _CUT_SECONDS for cut in refused
            )
        ]
        known = [decision for decision in found if decision is not None]
        return sorted(known, key=lambda decision: decision.at)

    def _unreached(self, owner: str, since: float) -> list[Unreached]:
        named = [
            entry
            for entry in self._logged(NO_ADDRESS_LOG, owner, since)
            if str(entry.get("error", "")).endswith(NO_ADDRESS_PAGE)
        ]
        tunnels = list(self._logged(TRAFFIC_LOG, owner, since))
        # Whose a failure was only its tunnel says, which is logged when it ends.
        failures = self._logged(BROKEN_LOG, None, since - _CUT_SECONDS) if tunnels else ()
        return [*without_address(named), *broken_tunnels(tunnels, failures)]

    def _logged(self, name: str, owner: str | None, since: float = 0.0) -> Iterator[dict[str, Any]]:
        """Yield what Squid itself has logged of an owner, or of everybody, oldest first."""
        for path in sorted((self.run_dir.egress / "log").glob(f"{name}*"), reverse=True):
            yield from entries_of(path, owner, since)

    # Parts --------------------------------------------------------------------------------

    def _write_defaults(self) -> None:
        record = {"domains": default_domains(self.paths)}
        write_atomically(self.run_dir.defaults, json.dumps(record).encode(), 0o640)

    def _write_parts(self) -> bool:
        """Write what Squid reads; tell whether any of it is new."""
        egress = self.run_dir.egress
        _directory(egress / "errors", "root", 0o750)
        for page in _SQUID_PAGES.iterdir():
            if page.name not in PAGES:
                shutil.copyfile(page, egress / "errors" / page.name)
        _directory(egress / "log", PROXY_USER, 0o700)
        _make_certificate(egress / PEEK_CERTIFICATE)
        _directory(self.run_dir.decisions, PROXY_USER, 0o700)
        self._forget_old_decisions()
        parts = {
            **{egress / "errors" / page: text.encode() for page, text in PAGES.items()},
            egress / "helper.pyz": _helper_archive(),
            self._config: squid_config(self._plan()).encode(),
        }
        changed = [path for path, data in parts.items() if not _holds(path, data)]
        for path in changed:
            write_atomically(path, parts[path], 0o640)
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

    def _forget_old_decisions(self) -> None:
        oldest = time.time() - _KEEP_DECISIONS_SECONDS
        records = (self.run_dir.decisions, self.run_dir.direct)
        for path in (path for record in records for path in record.glob("*.ndjson")):
            if path.stat().st_mtime < oldest:
                path.unlink(missing_ok=True)

    # Process ------------------------------------------------------------------------------

    def _launch(self) -> None:
        # A killed Squid leaves its pid behind, and a new one would take it for alive.
        (self.run_dir.egress / "squid.pid").unlink(missing_ok=True)
        log = self.run_dir.egress / "log" / "cache.log"
        earlier = log.stat().st_size if log.exists() else 0
        try:
            run([*_limit(), _squid(), "-f", str(self._config)], timeout=_START_SECONDS)
        except CommandFailed as error:
            why = telling_lines(error.output.decode(errors="replace")) or error.detail
            raise HostUnavailable(f"The egress proxy does not start. {why}") from error
        patience = Patience(_START_SECONDS, lambda: [*self.processes(), *self.helpers()])
        while not self.healthy():
            if patience.exhausted():
                why = telling_lines(_text_from(log, earlier))
                raise HostUnavailable(
                    f"The egress proxy does not answer; it {patience.reason}. {why}"
                )
            time.sleep(_POLL_SECONDS)

    def processes(self) -> list[int]:
        """Return Squid's processes of this instance: those that name our configuration file."""
        wanted = os.fsencode(self._config)
        return [pid for pid in _pids() if wanted in _command_line(pid).split(b"\0")]

    def helpers(self) -> list[int]:
        """Return the helpers' processes."""
        wanted = os.fsencode(self.run_dir.egress / "helper.pyz")
        return [pid for pid in _pids() if wanted in _command_line(pid).split(b"\0")]


def proxy_obstacles() -> list[str]:
    """Return sentences about what on this host would keep the proxy from running."""
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
    """Return the host's registries; npm's from the node base if the host has no npm."""
    return registries.host_registries(paths.images / "node-22" / "tree")


def _decision(entry: dict[str, Any]) -> EgressDecision | None:
    try:
        return from_fields(EgressDecision, entry)
    except MalformedError:
        return None


def _not_tls(entry: dict[str, Any]) -> EgressDecision:
    verdict = policy.not_tls(entry["host"])
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


def _came_to_nothing(owner: str, one: Unreached) -> EgressDecision:
    return EgressDecision(
        at=one.at,
        owner=owner,
        host=one.host,
        port=one.port,
        verdict="unreached",
        reason=one.reason,
        method="CONNECT",
        message=one.message,
    )


def _make_certificate(path: Path) -> None:
    """Write a self-signed certificate with its key, for as long as there is none."""
    if path.exists():
        return
    key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    out = ["-days", "7300", "-subj", "/CN=egress", "-keyout", "-", "-out", "-"]
    made = run(["openssl", "req", "-x509", *key, *out], timeout=_START_SECONDS)
    write_atomically(path, made.stdout, 0o640)


def _helper_archive() -> bytes:
    """Return the helper as a zip Python can run; the same bytes for the same sources."""
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


def _limit() -> tuple[str, ...]:
    """Return what to start Squid with, as it takes no more descriptors than root may have.

    Without CAP_SYS_RESOURCE (a container's root) that is not ours to raise: it takes what it gets.
    And unlike the agent, whose child it is, it is no process that the kernel must spare when
    memory ends (choom(1)): tenants talk to it, and it is started again.
    """
    wanted = (
        ("choom", "-n", "0", "--"),
        ("prlimit", f"--nofile={DESCRIPTORS}:{DESCRIPTORS}", "--"),
    )
    return tuple(word for prefix in wanted if _is_allowed(prefix) for word in prefix)


def _is_allowed(prefix: tuple[str, ...]) -> bool:
    try:
        run([*prefix, "true"], timeout=_START_SECONDS)
    except CommandFailed:
        return False
    return True


def _local_addresses(settings: NetworkSettings) -> tuple[str, ...]:
    """Return the host's own addresses, which a name must not lead to; less the permitted ones."""
    listing = json.loads(run(["ip", "-j", "address"], timeout=_START_SECONDS).stdout)
    texts = {info["local"] for link in listing for info in link.get("addr_info", [])}
    known = (*settings.denied, *settings.permitted)
    return tuple(sorted(t for t in texts if not policy.is_denied(ip_address(t), known)))


def _text_from(log: Path, offset: int) -> str:
    """What was written into a log after its first ``offset`` bytes."""
    if not log.exists():
        return ""
    with log.open("rb") as opened:
        opened.seek(offset)
        return opened.read().decode(errors="replace")


def _directory(path: Path, user: str, mode: int) -> None:
    proxy = pwd.getpwnam(PROXY_USER)
    path.mkdir(exist_ok=True)
    os.chown(path, proxy.pw_uid if user == PROXY_USER else 0, proxy.pw_gid)
    path.chmod(mode | 0o2000)


def _holds(path: Path, data: bytes) -> bool:
    return path.exists() and path.read_bytes() == data


def _pids() -> list[int]:
    """The host's processes: those of a container may call themselves what they like."""
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


def _send(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return

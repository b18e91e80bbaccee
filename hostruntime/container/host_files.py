"""The files that the host adds over a container's image: paths and contents, by network mode.

Programs find the proxy and the certificates in different places.  Commands that the agent runs get
the environment of :func:`container_environment`; everything else (`sudo`, `su -`, cron, logins,
services) starts with an empty environment, so the same settings are written to wherever each of
them looks: PAM's /etc/environment, the drop-ins of sudo, of shells and of service scripts, and the
configuration of those programs that read no variable.

For files that an image may have itself, this is only *our part*;
:mod:`hostruntime.container.merging` merges the two.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from hostruntime.container.authorities import certificates
from hostruntime.container.figures import variables
from hostruntime.errors import HostUnavailable
from hostruntime.network.policy import Mode
from hostruntime.network.registries import Registries
from hostruntime.network.slots import SlotPool
from hostruntime.network.stub_resolver import ADDRESS as STUB

BASE_CODENAME = "bookworm"
CA_BUNDLE = "etc/ssl/certs/ca-certificates.crt"
LOCAL_CAS = "usr/local/share/ca-certificates"
TRUST_STORE = ".orkestr/cacerts.jks"
GIT_CONFIG = ".orkestr/gitconfig"
HOSTNAME = "sandbox"
_QUIET_NODE = ".orkestr/quiet.cjs"
_BUNDLE_VARIABLE = "SSL_CERT_FILE"
_HOST_BUNDLES = (Path("/etc/ssl/certs/ca-certificates.crt"), Path("/etc/pki/tls/cert.pem"))
_HOST_LOCAL_CAS = Path("/usr/local/share/ca-certificates")
_HOST_PUBLIC_CAS = Path("/usr/share/ca-certificates")
_INIT_BINARIES = (Path("/usr/bin/catatonit"), Path("/usr/libexec/catatonit/catatonit"))
_ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/root",
    "LANG": "C.UTF-8",
    "DEBIAN_FRONTEND": "noninteractive",
    "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    "PIP_ROOT_USER_ACTION": "ignore",
    "NPM_CONFIG_GLOBALCONFIG": "/etc/npmrc",
    # These would contact hosts that the user never asked for, and be refused and logged.
    "YARN_ENABLE_TELEMETRY": "0",
    "DENO_NO_UPDATE_CHECK": "1",
    "NEXT_TELEMETRY_DISABLED": "1",
}
# Makes programs use local data, and fail immediately if it is missing, while the network is off:
# without these some retry for minutes, and npx does not even run what is in its cache.  Programs
# that have such a switch but no variable for it are configured in their files.
_OFFLINE = {
    "UV_OFFLINE": "1",
    "COREPACK_ENABLE_NETWORK": "0",
    "CARGO_NET_OFFLINE": "true",
    "CONDA_OFFLINE": "true",
    "HF_HUB_OFFLINE": "1",
}
# Variables that a login sets by itself, for the user it logs in.
_SET_BY_LOGIN = frozenset({"PATH", "HOME"})
_CA_VARIABLES = (
    "SSL_CERT_FILE",
    "REQUESTS_CA_BUNDLE",
    "PIP_CERT",
    "CURL_CA_BUNDLE",
    "NODE_EXTRA_CA_CERTS",
    "GIT_SSL_CAINFO",
)
_NO_PROXY = "localhost,127.0.0.1,::1"
# An older Node exits on an unknown --disable-warning option; --require works in every version.
_QUIET_NODE_SOURCE = """\
'use strict';
// Node warns of NODE_USE_ENV_PROXY in every process; this network has no other way out.
const emit = process.emit;
process.emit = function (name, warning, ...rest) {
  if (name === 'warning' && warning && warning.code === 'UNDICI-EHPA') return false;
  return Reflect.apply(emit, this, [name, warning, ...rest]);
};
"""


@dataclass(frozen=True)
class LayerFile:
    """One file of a layer, at a path relative to its root."""

    path: str
    data: bytes
    mode: int = 0o644


def container_environment(mode: str, pool: SlotPool, cpu: float | None = None) -> dict[str, str]:
    """Return the initial environment of every process in a container of a mode and CPU limit."""
    environment = {**_ENVIRONMENT, **dict.fromkeys(_CA_VARIABLES, f"/{CA_BUNDLE}")}
    if mode == "restricted":
        environment |= _proxy_environment(_proxy_url(pool))
    if mode == "off":
        environment |= _OFFLINE
    if java := _java_options(mode, pool):
        environment["JAVA_TOOL_OPTIONS"] = " ".join(java)
    if cpu is not None:
        environment |= variables(cpu)
    return environment


def host_files(
    mode: Mode, pool: SlotPool, registries: Registries, domains: Sequence[str]
) -> list[LayerFile]:
    """Return the files of a mode; ``domains`` are those of the default list.

    Raises HostUnavailable if the host lacks init or a certificate bundle, OSError.
    """
    return [
        LayerFile(".orkestr/init", _first(_INIT_BINARIES, "catatonit").read_bytes(), 0o755),
        LayerFile(CA_BUNDLE, _host_bundle().read_bytes()),
        *(LayerFile(f"{LOCAL_CAS}/{name}", data) for name, data in own_authorities().items()),
        *_name_resolution(mode, pool.settings.resolvers),
        *_package_managers(mode, pool, registries),
        *_environment_files(container_environment(mode, pool)),
        *(_other_programs(pool, domains) if mode == "restricted" else ()),
    ]


# Certificates -----------------------------------------------------------------------------


def _host_bundle() -> Path:
    configured = os.environ.get(_BUNDLE_VARIABLE)
    return _first((*([Path(configured)] if configured else []), *_HOST_BUNDLES), "ca-certificates")


def _first(candidates: tuple[Path, ...], package: str) -> Path:
    for path in candidates:
        if path.is_file():
            return path
    raise HostUnavailable(f"{candidates[-1]} is missing; install the package {package}.")


@cache
def _own_authorities(_bundle: str | None, local: Path, public: Path) -> Mapping[str, bytes]:
    files = [path for path in sorted(local.rglob("*.crt")) if path.is_file()]
    authorities = {path.name: path.read_bytes() for path in files}
    published = sorted(public.rglob("*.crt"))
    if published:
        known = certificates(b"\n".join(authorities.values()))
        known |= certificates(b"\n".join(path.read_bytes() for path in published))
        host_only = [
            text
            for key, text in certificates(_host_bundle().read_bytes()).items()
            if key not in known
        ]
        authorities |= {
            f"orkestr-host-{n}.crt": text + b"\n" for n, text in enumerate(host_only, 1)
        }
    return authorities


def own_authorities() -> Mapping[str, bytes]:
    """The authorities that this host trusts in addition to the public ones, one per file.

    update-ca-certificates(8), run inside by a package's postinst, regenerates the bundle from
    these and the image's own.
    """
    # Each command asks for them, on the event loop: no file is looked at but the first time.
    return _own_authorities(os.environ.get(_BUNDLE_VARIABLE), _HOST_LOCAL_CAS, _HOST_PUBLIC_CAS)


# Programs ---------------------------------------------------------------------------------


def _name_resolution(mode: Mode, resolvers: tuple[str, ...]) -> Iterator[LayerFile]:
    hosts = f"127.0.0.1 localhost\n127.0.1.1 {HOSTNAME}\n::1 localhost ip6-localhost ip6-loopback\n"
    yield LayerFile("etc/hosts", hosts.encode())
    yield LayerFile("etc/hostname", f"{HOSTNAME}\n".encode())
    servers = "".join(f"nameserver {address}\n" for address in resolvers if ":" not in address)
    # It resolves no names; each query is refused immediately, and recorded.
    refusing = f"# network {mode}: no name is resolved in here\nnameserver {STUB}\n"
    refusing += "options timeout:1 attempts:1\n"
    yield LayerFile("etc/resolv.conf", (servers if mode == "open" else refusing).encode())


def _package_managers(mode: Mode, pool: SlotPool, registries: Registries) -> Iterator[LayerFile]:
    url = _proxy_url(pool) if mode == "restricted" else None
    npmrc = _npmrc(mode, url, registries).encode()
    yield LayerFile("etc/npmrc", npmrc)
    # In npm's prefix, for an npm without NPM_CONFIG_GLOBALCONFIG in its environment.
    yield LayerFile("usr/local/etc/npmrc", npmrc)
    # Read before /etc/pip.conf (pip's user guide, "Configuration"), which is the image's.
    options = {"cert": f"/{CA_BUNDLE}", **({"proxy": url} if url else {})}
    if mode == "off":
        # pip has no offline switch, and reports why it finds nothing only when it retries.
        options["retries"] = "1"
    yield LayerFile("etc/xdg/pip/pip.conf", registries.pip_conf(options).encode())
    if sources := registries.apt_sources(BASE_CODENAME):
        yield LayerFile("etc/apt/sources.list", sources.encode())
    yield LayerFile("etc/apt/apt.conf.d/80orkestr", _apt_conf(mode, url).encode())
    if yarn := _yarnrc(mode, url, registries):
        yield LayerFile(".yarnrc.yml", yarn.encode())


def _npmrc(mode: Mode, url: str | None, registries: Registries) -> str:
    npmrc = f"update-notifier=false\n{registries.npmrc()}cafile=/{CA_BUNDLE}\n"
    if url:
        npmrc += f"proxy={url}\nhttps-proxy={url}\nnoproxy={_NO_PROXY}\n"
    return npmrc + ("offline=true\n" if mode == "off" else "")


def _apt_conf(mode: Mode, url: str | None) -> str:
    apt = f'Acquire::Languages "none";\nAcquire::Retries "{0 if mode == "off" else 3}";\n'
    if url:
        apt += f'Acquire::http::Proxy "{url}";\nAcquire::https::Proxy "{url}";\n'
    return apt


def _yarnrc(mode: Mode, url: str | None, registries: Registries) -> str:
    """For Yarn 2 and later, which searches every directory above a project, but no npmrc."""
    registry = registries.npm_registry()
    yarn = [f"npmRegistryServer: {registry}"] if registry else []
    yarn += [f"httpProxy: {url}", f"httpsProxy: {url}"] if url else []
    yarn += ["enableNetwork: false"] if mode == "off" else []
    return "".join(f"{line}\n" for line in yarn)


def _environment_files(environment: Mapping[str, str]) -> Iterator[LayerFile]:
    variables = {name: value for name, value in environment.items() if name not in _SET_BY_LOGIN}
    # pam_env(8) reads it for su, sudo, cron, sshd and login.
    pam = "".join(f"{name}={value}\n" for name, value in variables.items())
    yield LayerFile("etc/environment", pam.encode())
    shell = "".join(
        f'[ -n "${{{name}+set}}" ] || export {name}={shlex.quote(value)}\n'
        for name, value in variables.items()
    )
    yield LayerFile("etc/profile.d/00-orkestr.sh", shell.encode())
    # service(8) starts scripts with an almost empty environment; they source this first
    # (init-functions of Debian's sysvinit-utils).
    yield LayerFile("usr/lib/lsb/init-functions.d/00-orkestr", shell.encode())
    keep = f'Defaults env_keep += "{" ".join(variables)}"\n'
    yield LayerFile("etc/sudoers.d/orkestr", keep.encode(), 0o440)


def _other_programs(pool: SlotPool, domains: Sequence[str]) -> Iterator[LayerFile]:
    """Configuration of programs that read the proxy from a file of their own."""
    url = _proxy_url(pool)
    yield LayerFile("etc/gitconfig", f"[include]\n\tpath = /{GIT_CONFIG}\n".encode())
    yield LayerFile(GIT_CONFIG, (_git_config(url) + git_rewrites(domains)).encode())
    wget = f"http_proxy = {url}\nhttps_proxy = {url}\nno_proxy = {_NO_PROXY}\n"
    yield LayerFile("etc/wgetrc", (wget + f"ca_certificate = /{CA_BUNDLE}\n").encode())
    yield LayerFile("root/.gnupg/dirmngr.conf", f"http-proxy {url}\nhonor-http-proxy\n".encode())
    yield LayerFile(_QUIET_NODE, _QUIET_NODE_SOURCE.encode())


def _git_config(url: str) -> str:
    direct = "".join(
        f'[http "http://{host}"]\n\tproxy =\n' for host in ("localhost", "127.0.0.1", "[::1]")
    )
    return f"[http]\n\tproxy = {url}\n\tsslCAInfo = /{CA_BUNDLE}\n{direct}"


def git_rewrites(domains: Sequence[str]) -> str:
    """Make git use HTTPS, which alone gets out, for SSH and git:// URLs."""
    url_prefixes = ("git@{0}:", "ssh://git@{0}/", "ssh://git@{0}:22/", "git://{0}/")
    return "".join(
        f'[url "https://{domain}/"]\n'
        + "".join(f"\tinsteadOf = {prefix.format(domain)}\n" for prefix in url_prefixes)
        for domain in domains
    )


def _proxy_url(pool: SlotPool) -> str:
    address, port = pool.proxy_address()
    return f"http://{address}:{port}"


def _proxy_environment(url: str) -> Mapping[str, str]:
    names = ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")
    yarn = ("YARN_HTTP_PROXY", "YARN_HTTPS_PROXY")
    return {
        **dict.fromkeys((*names, *yarn), url),
        **dict.fromkeys(("no_proxy", "NO_PROXY"), _NO_PROXY),
        "NODE_USE_ENV_PROXY": "1",
        "NODE_OPTIONS": f"--require=/{_QUIET_NODE}",
    }


def _java_options(mode: str, pool: SlotPool) -> list[str]:
    """Options for JVMs and Maven, which read neither the variables nor the bundle.

    Java's "Networking Properties"; Maven's resolver honours them only with the last one.
    """
    options: list[str] = []
    if mode == "restricted":
        address, port = pool.proxy_address()
        for scheme in ("http", "https"):
            options += [f"-D{scheme}.proxyHost={address}", f"-D{scheme}.proxyPort={port}"]
        options.append("-Daether.connector.http.useSystemProperties=true")
    # A JVM's built-in store has the public authorities.
    if mode != "off" and own_authorities():
        options.append(f"-Djavax.net.ssl.trustStore=/{TRUST_STORE}")
    return options

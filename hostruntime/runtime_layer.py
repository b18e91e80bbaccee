"""The runtime layer: what every container sees over its image, and no image ever contains.

A small tree per network mode, mounted as the topmost lower layer, so nothing of it is captured.
It brings init, the host's certificate authorities, name resolution, and the package managers'
configuration. Its directories show through with their own modes, which are therefore the usual
ones, owned by id 0. A tree is named after its content (`restricted-3f2a…`), never changed, and
removed once no container has it mounted.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from hostruntime.egress import host_registries
from hostruntime.errors import HostUnavailable
from hostruntime.network import SlotPool
from hostruntime.paths import StatePaths
from hostruntime.policy import MODES, Mode
from hostruntime.registries import Registries

BASE_CODENAME = "bookworm"
CA_BUNDLE = "etc/ssl/certs/ca-certificates.crt"
HOSTNAME = "sandbox"
_HOST_BUNDLES = (Path("/etc/ssl/certs/ca-certificates.crt"), Path("/etc/pki/tls/cert.pem"))
_HOST_LOCAL_CAS = Path("/usr/local/share/ca-certificates")
_INIT_BINARIES = (Path("/usr/bin/catatonit"), Path("/usr/libexec/catatonit/catatonit"))
_ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/root",
    "LANG": "C.UTF-8",
    "DEBIAN_FRONTEND": "noninteractive",
    "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    "PIP_ROOT_USER_ACTION": "ignore",
    "NPM_CONFIG_GLOBALCONFIG": "/etc/npmrc",
}
_CA_VARIABLES = (
    "SSL_CERT_FILE",
    "REQUESTS_CA_BUNDLE",
    "PIP_CERT",
    "CURL_CA_BUNDLE",
    "NODE_EXTRA_CA_CERTS",
    "GIT_SSL_CAINFO",
)
_NO_PROXY = "localhost,127.0.0.1,::1"


@dataclass(frozen=True)
class LayerFile:
    """One file of a layer, at a path relative to its root."""

    path: str
    data: bytes
    mode: int = 0o644


def build_runtime_layers(paths: StatePaths, pool: SlotPool) -> None:
    """Write the three layers and make them the ones new containers get; idempotent.

    Raises HostUnavailable when the host lacks init or a certificate bundle, OSError.
    """
    registries = host_registries(paths)
    for mode in MODES:
        files = layer_files(mode, pool, registries)
        tree = _published(paths, mode, files)
        _point(paths.runtime / mode, tree.name)
    _remove_unused(paths)


def runtime_tree(paths: StatePaths, mode: str) -> Path:
    """Return the layer that new containers of a mode get; raises HostUnavailable before any is."""
    link = paths.runtime / mode
    if not link.is_symlink():
        raise HostUnavailable("The runtime layers are not built; restart the host agent.")
    return paths.runtime / link.readlink()


def container_environment(mode: str, pool: SlotPool) -> dict[str, str]:
    """Return the environment every process in a container of a mode begins with."""
    environment = {**_ENVIRONMENT, **dict.fromkeys(_CA_VARIABLES, f"/{CA_BUNDLE}")}
    if mode == "restricted":
        environment |= _proxy_environment(_proxy_url(pool))
    return environment


def layer_files(mode: Mode, pool: SlotPool, registries: Registries) -> list[LayerFile]:
    """Return what a mode's layer contains."""
    return [
        LayerFile(".orkestr/init", _first(_INIT_BINARIES, "catatonit").read_bytes(), 0o755),
        LayerFile(CA_BUNDLE, _host_bundle().read_bytes()),
        *_local_authorities(),
        *_name_resolution(mode, pool.settings.resolvers),
        *_package_managers(mode, pool, registries),
    ]


# Contents ---------------------------------------------------------------------------------


def _host_bundle() -> Path:
    named = os.environ.get("SSL_CERT_FILE")
    return _first((*([Path(named)] if named else []), *_HOST_BUNDLES), "ca-certificates")


def _first(candidates: tuple[Path, ...], package: str) -> Path:
    for path in candidates:
        if path.is_file():
            return path
    raise HostUnavailable(f"{candidates[-1]} is missing; install the package {package}.")


def _local_authorities() -> Iterator[LayerFile]:
    # update-ca-certificates(8), run inside by a package's postinst, rebuilds the bundle from
    # these and the image's own.
    if _HOST_LOCAL_CAS.is_dir():
        for path in sorted(_HOST_LOCAL_CAS.rglob("*.crt")):
            if path.is_file():
                yield LayerFile(f"usr/local/share/ca-certificates/{path.name}", path.read_bytes())


def _name_resolution(mode: Mode, resolvers: tuple[str, ...]) -> Iterator[LayerFile]:
    hosts = f"127.0.0.1 localhost\n127.0.1.1 {HOSTNAME}\n::1 localhost ip6-localhost ip6-loopback\n"
    yield LayerFile("etc/hosts", hosts.encode())
    yield LayerFile("etc/hostname", f"{HOSTNAME}\n".encode())
    servers = "".join(f"nameserver {address}\n" for address in resolvers if ":" not in address)
    none = f"# network {mode}: no name is resolved in here\n"
    yield LayerFile("etc/resolv.conf", (servers if mode == "open" else none).encode())


def _package_managers(mode: Mode, pool: SlotPool, registries: Registries) -> Iterator[LayerFile]:
    yield LayerFile("etc/npmrc", b"update-notifier=false\n" + registries.npmrc().encode())
    if pip_conf := registries.pip_conf():
        yield LayerFile("etc/pip.conf", pip_conf.encode())
    if sources := registries.apt_sources(BASE_CODENAME):
        yield LayerFile("etc/apt/sources.list", sources.encode())
    options = 'Acquire::Languages "none";\nAcquire::Retries "3";\n'
    if mode == "restricted":
        url = _proxy_url(pool)
        options += f'Acquire::http::Proxy "{url}";\nAcquire::https::Proxy "{url}";\n'
    yield LayerFile("etc/apt/apt.conf.d/80orkestr", options.encode())


def _proxy_url(pool: SlotPool) -> str:
    address, port = pool.proxy_address()
    return f"http://{address}:{port}"


def _proxy_environment(url: str) -> Mapping[str, str]:
    return {
        **dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), url),
        **dict.fromkeys(("no_proxy", "NO_PROXY"), _NO_PROXY),
        "NODE_USE_ENV_PROXY": "1",
    }


# Trees on disk ----------------------------------------------------------------------------


def _published(paths: StatePaths, mode: Mode, files: list[LayerFile]) -> Path:
    tree = paths.runtime / f"{mode}-{_digest(files)}"
    if tree.is_dir():
        return tree
    making = paths.runtime / f".{tree.name}.making"
    shutil.rmtree(making, ignore_errors=True)
    _directory(making)
    # A place to mount on, so that LXC makes none in the writable layer.
    _directory(making / "workspace")
    for file in files:
        _write(making, file)
    making.rename(tree)
    return tree


def _digest(files: list[LayerFile]) -> str:
    digest = hashlib.sha256()
    for file in sorted(files, key=lambda file: file.path):
        head = f"{file.path}\0{file.mode:o}\0{len(file.data)}\0"
        digest.update(head.encode() + file.data)
    return digest.hexdigest()[:16]


def _write(root: Path, file: LayerFile) -> None:
    target = root / file.path
    for parent in reversed(target.relative_to(root).parents[:-1]):
        _directory(root / parent)
    target.write_bytes(file.data)
    target.chmod(file.mode)


def _directory(path: Path) -> None:
    path.mkdir(exist_ok=True)
    path.chmod(0o755)


def _point(link: Path, name: str) -> None:
    """Make a symbolic link point elsewhere without a moment in which it is gone."""
    fresh = link.with_name(f".{link.name}.new")
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(name)
    fresh.rename(link)


def _remove_unused(paths: StatePaths) -> None:
    current = {runtime_tree(paths, mode) for mode in MODES}
    mounted = _mounted_roots()
    for path in paths.runtime.iterdir():
        kept = path in current or path.is_symlink()
        if not kept and not any(root.endswith(f"/{path.name}") for root in mounted):
            shutil.rmtree(path)


def _mounted_roots() -> list[str]:
    """Return the source directory of every mount (the fourth field of mountinfo, proc(5))."""
    lines = Path("/proc/self/mountinfo").read_text(errors="replace").splitlines()
    return [line.split(" ")[3] for line in lines]

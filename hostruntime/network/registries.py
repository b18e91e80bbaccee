"""The registries this host's package managers use: queried from them, never hard-coded here.

They become domains of the default allowlist, and the configuration of pip, npm and apt inside
containers, so an operator who points the host to a mirror points the sandboxes there, too.
Credentials in an address stay on the host.
"""

from __future__ import annotations

import configparser
import functools
import json
import os
import platform
import re
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from urllib.parse import urlsplit

from hostruntime.host.run import CommandFailed, run
from hostruntime.network.policy import TLS_PORT, canonical_host

_TIMEOUT = 60.0
_PASSED_VARIABLES = ("PIP_", "UV_", "NPM_CONFIG_", "npm_config_", "APT_CONFIG")
# pip's default index, and where that index stores its files (pip's own constants).
_PIP_DEFAULTS = (
    "from pip._internal.models.index import PyPI as i; print(i.simple_url, i.file_storage_domain)"
)
_APT_FORMAT = "$(SITE)\t$(RELEASE)\t$(COMPONENT)\t$(ORIGIN)"
# How apt prints an origin that is unknown, as the lists have not been fetched.
_UNKNOWN_ORIGINS = frozenset({"", "$(ORIGIN)"})
_NPM_DEFINITIONS = Path(
    "usr/local/lib/node_modules/npm/node_modules/@npmcli/config/lib/definitions/definitions.js"
)
_NPM_DEFAULT = re.compile(r"""Definition\(['"]registry['"],\s*\{\s*default:\s*['"]([^'"]+)['"]""")
_MIRROR_LIST = "mirror+file:"
_DEBIAN_COMPONENTS = frozenset({"main", "contrib", "non-free", "non-free-firmware"})
_SUITE_SUFFIXES = ("-updates", "-security", "-backports")


@dataclass(frozen=True)
class PipConfig:
    """pip's indexes: the configured addresses and the defaults."""

    index: str | None
    extra: tuple[str, ...]
    default_index: str | None
    default_files: str | None


@dataclass(frozen=True)
class NpmConfig:
    """npm's registry, and those of scopes (`@scope:registry` to address)."""

    registry: str
    scoped: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class AptSource:
    """One of Debian's own suites on the host's mirror; `suffix` is "", "-updates" and so on."""

    site: str
    suffix: str
    component: str


@dataclass(frozen=True)
class Registries:
    """The package managers' registries; `notes` are sentences about what containers cannot use."""

    domains: tuple[str, ...]
    pip: PipConfig | None
    npm: NpmConfig | None
    apt: tuple[AptSource, ...]
    notes: tuple[str, ...]

    def pip_conf(self, more: Mapping[str, str] | None = None) -> str:
        """Return pip's global configuration for containers, with ``more`` options in it."""
        options = dict(more or {})
        if self.pip is not None:
            index = [url for url in (self.pip.index,) if url and url != self.pip.default_index]
            options["index-url"] = " ".join(filter(_is_usable, index))
            options["extra-index-url"] = "\n".join(filter(_is_usable, self.pip.extra))
        return _pip_text({name: value for name, value in options.items() if value})

    def npm_registry(self) -> str | None:
        """Return npm's registry, if containers can use it."""
        return self.npm.registry if self.npm is not None and _is_usable(self.npm.registry) else None

    def npmrc(self) -> str:
        """Return npm's global configuration for containers."""
        if self.npm is None:
            return ""
        is_suite = (("registry", self.npm.registry), *self.npm.scoped)
        return "".join(f"{name}={url}\n" for name, url in is_suite if _is_usable(url))

    def apt_sources(self, codename: str) -> str:
        """Return a sources.list(5) of Debian's own suites, over HTTPS."""
        grouped: dict[tuple[str, str], list[str]] = {}
        for source in self.apt:
            key = (_over_https(source.site), codename + source.suffix)
            grouped.setdefault(key, []).append(source.component)
        lines = (
            f"deb {site} {suite} {' '.join(dict.fromkeys(components))}\n"
            for (site, suite), components in grouped.items()
        )
        return "".join(lines)


@functools.cache
def host_registries(node_tree: Path | None = None) -> Registries:
    """Query pip, npm and apt; cached until :func:`clear_cache`.

    `node_tree` is a root tree with npm, used if the host has none. A package manager that is
    missing or fails is skipped, with a note.
    """
    with ThreadPoolExecutor(max_workers=3, thread_name_prefix="registries") as pool:
        pip = pool.submit(query_pip)
        npm = pool.submit(query_npm, node_tree)
        apt = pool.submit(query_apt)
    return combine(pip.result(), npm.result(), apt.result())


def clear_cache() -> None:
    """Query the package managers again next time."""
    host_registries.cache_clear()


def combine(pip: PipConfig | None, npm: NpmConfig | None, apt: Sequence[AptSource]) -> Registries:
    """Combine the results: the domains they need, and notes about what containers cannot use."""
    urls = [*_pip_urls(pip), *_npm_urls(npm), *(_over_https(source.site) for source in apt)]
    notes = [
        *([] if pip else ["pip was not found on this host: its index is not allowed by default"]),
        *(
            []
            if npm
            else ["npm was not found on this host: its registry is not allowed by default"]
        ),
        *([] if apt else ["apt names no Debian mirror: apt-get will not work in sandboxes"]),
    ]
    domains: dict[str, None] = {}
    for url in urls:
        domain, note = _domain(url)
        if domain is not None:
            domains[domain] = None
        if note is not None:
            notes.append(note)
    if pip and pip.default_files and _uses_default_index(pip):
        domains[pip.default_files] = None
    return Registries(tuple(domains), pip, npm, tuple(apt), tuple(dict.fromkeys(notes)))


# pip --------------------------------------------------------------------------------------


def query_pip() -> PipConfig | None:
    """Query the first pip that works; None without one."""
    for python, environment in _pythons_with_pip():
        try:
            listing = run(
                [python, "-m", "pip", "config", "list"], env=environment, timeout=_TIMEOUT
            )
            defaults = run([python, "-c", _PIP_DEFAULTS], env=environment, timeout=_TIMEOUT)
        except CommandFailed:
            continue
        return parse_pip(listing.text, defaults.text)
    return None


def parse_pip(listing: str, defaults: str) -> PipConfig:
    """Parse `pip config list` (lines of `section.key='value'`; later sections take precedence)."""
    values: dict[str, str] = {}
    for line in listing.splitlines():
        name, _, value = line.partition("=")
        values[name.rpartition(".")[2]] = value.strip().strip("'\"").replace("\\n", " ")
    words = defaults.split()
    return PipConfig(
        index=values.get("index-url"),
        extra=tuple(values.get("extra-index-url", "").split()),
        default_index=words[0].rstrip("/") + "/" if words else None,
        default_files=canonical_host(words[1]) if len(words) > 1 else None,
    )


def _pythons_with_pip() -> Iterable[tuple[str, dict[str, str]]]:
    is_suite = (shutil.which("python3"), shutil.which("python"), "/usr/bin/python3")
    for python in dict.fromkeys(filter(None, (sys.executable, *is_suite))):
        yield python, _environment()
    # No pip anywhere (a machine set up by uv): use the copy bundled with every CPython.
    bundled = sorted(_bundled_pip())
    if bundled:
        yield sys.executable, {**_environment(), "PYTHONPATH": str(bundled[-1])}


def _bundled_pip() -> Iterable[Path]:
    spec = find_spec("ensurepip")
    if spec is None or spec.origin is None:
        return ()
    return (Path(spec.origin).parent / "_bundled").glob("pip-*.whl")


def _pip_urls(pip: PipConfig | None) -> list[str]:
    if pip is None:
        return []
    index = pip.index or pip.default_index
    return [url for url in (index, *pip.extra, *_uv_indexes()) if url and _is_http(url)]


def _uses_default_index(pip: PipConfig) -> bool:
    return any(url.rstrip("/") == (pip.default_index or "").rstrip("/") for url in _pip_urls(pip))


def _uv_indexes() -> list[str]:
    names = ("UV_DEFAULT_INDEX", "UV_INDEX_URL", "UV_INDEX", "UV_EXTRA_INDEX_URL")
    words = " ".join(os.environ.get(name, "") for name in names).split()
    return [
        word.rpartition("=")[2] if word.partition("=")[0].isidentifier() else word for word in words
    ]


def _pip_text(options: Mapping[str, str]) -> str:
    if not options:
        return ""
    parser = configparser.RawConfigParser()
    parser["global"] = dict(options)
    buffer = StringIO()
    parser.write(buffer)
    return buffer.getvalue()


# npm --------------------------------------------------------------------------------------


def query_npm(node_tree: Path | None = None) -> NpmConfig | None:
    """Query the host's npm, or read the default of the one in a root tree; None without one."""
    if (npm := shutil.which("npm")) is not None:
        try:
            command = [npm, "config", "list", "--json"]
            # Otherwise npm would create its cache in the home and write logs there.
            overrides = {"NPM_CONFIG_CACHE": "/dev/null/npm", "NPM_CONFIG_LOGS_MAX": "0"}
            return parse_npm(run(command, env=_environment() | overrides, timeout=_TIMEOUT).text)
        except (CommandFailed, ValueError, KeyError):
            pass
    definitions = node_tree / _NPM_DEFINITIONS if node_tree is not None else None
    if definitions is None or not definitions.is_file():
        return None
    # Not run: npm would write its logs into the tree, which is immutable.
    return parse_npm_definitions(definitions.read_text(errors="replace"))


def parse_npm_definitions(source: str) -> NpmConfig | None:
    """Find the default registry in npm's own table of settings."""
    found = _NPM_DEFAULT.search(source)
    return None if found is None else NpmConfig(registry=found.group(1), scoped=())


def parse_npm(listing: str) -> NpmConfig:
    """Parse `npm config list --json`; raises ValueError or KeyError if it is malformed."""
    values = json.loads(listing)
    scoped = tuple(
        (name, str(url))
        for name, url in sorted(values.items())
        if name.startswith("@") and name.endswith(":registry")
    )
    return NpmConfig(registry=str(values["registry"]), scoped=scoped)


def _npm_urls(npm: NpmConfig | None) -> list[str]:
    return [] if npm is None else [npm.registry, *(url for _, url in npm.scoped)]


# apt --------------------------------------------------------------------------------------


def query_apt() -> tuple[AptSource, ...]:
    """Query apt for the Debian suites the host uses; empty without apt.

    This queries twice: for fetched lists, whose origin is known, and for everything configured, as
    a machine that never ran `apt-get update` (an image, a container) has no lists.
    """
    command = ["apt-get", "indextargets", "--format", _APT_FORMAT]
    try:
        fetched = run(command, env=_environment(), timeout=_TIMEOUT)
        configured = run([*command, "--no-release-info"], env=_environment(), timeout=_TIMEOUT)
    except CommandFailed:
        return ()
    return parse_apt(fetched.text + configured.text, on_debian=_is_debian())


def parse_apt(listing: str, *, on_debian: bool = True) -> tuple[AptSource, ...]:
    """Parse `apt-get indextargets`; keep Debian's own suites, not those of other vendors.

    An unknown origin is inferred from the site's other suites; on distributions other than
    Debian, unknown origins are not Debian's.
    """
    targets = [_target(line) for line in listing.splitlines()]
    origins = {
        (site, release): origin
        for site, release, _, origin in targets
        if origin not in _UNKNOWN_ORIGINS
    }
    debians = {site for (site, _), origin in origins.items() if origin == "Debian"}
    if on_debian:
        known = {site for site, _ in origins}
        debians |= _likely_debian_sites(
            [target for target in targets if target[0] not in known], debians
        )
    found: dict[AptSource, None] = {}
    for site, release, component, _ in targets:
        suffix = next((end for end in _SUITE_SUFFIXES if release.endswith(end)), "")
        is_debian = site in debians and origins.get((site, release), "Debian") == "Debian"
        is_suite = component in _DEBIAN_COMPONENTS and release.removesuffix(suffix).isalpha()
        if is_debian and is_suite and _is_http(site):
            found[AptSource(site, suffix, component)] = None
    return tuple(found)


_Target = tuple[str, str, str, str]


def _target(line: str) -> _Target:
    """Split a line into site, release, component and origin."""
    site, release, component, origin = (line.split("\t") + [""] * 4)[:4]
    return _first_mirror(site).rstrip("/"), release, component, origin


def _likely_debian_sites(unknown: Sequence[_Target], known: Set[str]) -> set[str]:
    """Return the sites that are likely Debian mirrors, of those whose origin is unknown.

    Debian has updates and security suites; vendors that copy its suite names do not.
    """
    updated = {site for site, release, *_ in unknown if release.endswith(_SUITE_SUFFIXES)}
    return updated if updated or known else {site for site, *_ in unknown}


def _is_debian() -> bool:
    """Whether this is Debian, by os-release(5)."""
    try:
        return platform.freedesktop_os_release()["ID"] == "debian"
    except OSError:
        return False


def _first_mirror(site: str) -> str:
    """Return the first HTTP address of a mirror list, or any other site unchanged.

    Debian's cloud images use mirror lists (apt-transport-mirror(1)).
    """
    if not site.startswith(_MIRROR_LIST):
        return site
    try:
        words = Path(site.removeprefix(_MIRROR_LIST)).read_text().split()
    except (OSError, UnicodeDecodeError):
        return site
    return next((word for word in words if _is_http(word)), site)


# Addresses --------------------------------------------------------------------------------


def _environment() -> dict[str, str]:
    """Return the variables by which the package managers find their configuration."""
    passed = {
        name: value for name, value in os.environ.items() if name.startswith(_PASSED_VARIABLES)
    }
    keep = {name: os.environ[name] for name in ("HOME", "PATH") if name in os.environ}
    return {**passed, **keep}


def _is_http(url: str) -> bool:
    return urlsplit(url).scheme in ("http", "https")


def _is_usable(url: str) -> bool:
    return _is_http(url) and urlsplit(url).username is None


def _over_https(url: str) -> str:
    return "https://" + url.partition("://")[2]


def _domain(url: str) -> tuple[str | None, str | None]:
    """Return the domain of an address, and a note if the proxy will refuse it anyway."""
    parts = urlsplit(url)
    host = canonical_host(parts.hostname or "")
    if host is None:
        return None, f"{parts.hostname} is an address: sandboxes reach package mirrors by name only"
    if parts.scheme != "https" or (parts.port or TLS_PORT) != TLS_PORT:
        return host, f"{host} is not on HTTPS port {TLS_PORT}, all that network restricted reaches"
    if parts.username is not None:
        return host, f"{host} needs credentials, which sandboxes are not given"
    return host, None

"""Where this host's package managers fetch from: asked of them, never written down here.

The answers become domains of the default allowlist and the configuration that pip, npm and apt
get inside containers, so an operator who points the host at a mirror has pointed the sandboxes
there too. Credentials in an address stay on the host.
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
_PASSED_ON = ("PIP_", "UV_", "NPM_CONFIG_", "npm_config_", "APT_CONFIG")
# What pip itself falls back to, and where that index keeps its files (pip's own constants).
_PIP_DEFAULTS = (
    "from pip._internal.models.index import PyPI as i; print(i.simple_url, i.file_storage_domain)"
)
_APT_FORMAT = "$(SITE)\t$(RELEASE)\t$(COMPONENT)\t$(ORIGIN)"
# How apt writes an origin that it has not learned yet.
_UNKNOWN = frozenset({"", "$(ORIGIN)"})
_NPM_DEFINITIONS = Path(
    "usr/local/lib/node_modules/npm/node_modules/@npmcli/config/lib/definitions/definitions.js"
)
_NPM_DEFAULT = re.compile(r"""Definition\(['"]registry['"],\s*\{\s*default:\s*['"]([^'"]+)['"]""")
_MIRROR_LIST = "mirror+file:"
_DEBIAN_COMPONENTS = frozenset({"main", "contrib", "non-free", "non-free-firmware"})
_SUITE_ENDINGS = ("-updates", "-security", "-backports")


@dataclass(frozen=True)
class PipAnswer:
    """pip's indexes: the addresses it is configured with and those it falls back to."""

    index: str | None
    extra: tuple[str, ...]
    default_index: str | None
    default_files: str | None


@dataclass(frozen=True)
class NpmAnswer:
    """npm's registry, and those of scopes (`@scope:registry` to address)."""

    registry: str
    scoped: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class AptSource:
    """One of Debian's own suites on the host's mirror; `ending` is "", "-updates" and so on."""

    site: str
    ending: str
    component: str


@dataclass(frozen=True)
class Registries:
    """What the package managers said; `notes` are sentences about what cannot be carried over."""

    domains: tuple[str, ...]
    pip: PipAnswer | None
    npm: NpmAnswer | None
    apt: tuple[AptSource, ...]
    notes: tuple[str, ...]

    def pip_conf(self, more: Mapping[str, str] | None = None) -> str:
        """Return pip's global configuration for containers, with ``more`` options in it."""
        options = dict(more or {})
        if self.pip is not None:
            index = [url for url in (self.pip.index,) if url and url != self.pip.default_index]
            options["index-url"] = " ".join(filter(_carried, index))
            options["extra-index-url"] = "\n".join(filter(_carried, self.pip.extra))
        return _pip_text({name: value for name, value in options.items() if value})

    def carries_npm(self) -> str | None:
        """Return npm's registry, if containers can be told of it."""
        return self.npm.registry if self.npm is not None and _carried(self.npm.registry) else None

    def npmrc(self) -> str:
        """Return npm's global configuration for containers."""
        if self.npm is None:
            return ""
        named = (("registry", self.npm.registry), *self.npm.scoped)
        return "".join(f"{name}={url}\n" for name, url in named if _carried(url))

    def apt_sources(self, codename: str) -> str:
        """Return a sources.list(5) of Debian's own suites, over HTTPS."""
        grouped: dict[tuple[str, str], list[str]] = {}
        for source in self.apt:
            key = (_over_https(source.site), codename + source.ending)
            grouped.setdefault(key, []).append(source.component)
        lines = (
            f"deb {site} {suite} {' '.join(dict.fromkeys(components))}\n"
            for (site, suite), components in grouped.items()
        )
        return "".join(lines)


@functools.cache
def host_registries(node_tree: Path | None = None) -> Registries:
    """Ask pip, npm and apt; remembered until :func:`forget`.

    `node_tree` is a root tree with npm, asked when the host has none. A package manager that is
    missing or fails is left out, with a note.
    """
    with ThreadPoolExecutor(max_workers=3, thread_name_prefix="registries") as pool:
        pip = pool.submit(ask_pip)
        npm = pool.submit(ask_npm, node_tree)
        apt = pool.submit(ask_apt)
    return combine(pip.result(), npm.result(), apt.result())


def forget() -> None:
    """Ask the package managers again next time."""
    host_registries.cache_clear()


def combine(pip: PipAnswer | None, npm: NpmAnswer | None, apt: Sequence[AptSource]) -> Registries:
    """Put the answers together: the domains they need, and what cannot be carried over."""
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


def ask_pip() -> PipAnswer | None:
    """Ask the first pip that answers; None without one."""
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


def parse_pip(listing: str, defaults: str) -> PipAnswer:
    """Read `pip config list` (a line `section.key='value'` each; later sections win)."""
    values: dict[str, str] = {}
    for line in listing.splitlines():
        name, _, value = line.partition("=")
        values[name.rpartition(".")[2]] = value.strip().strip("'\"").replace("\\n", " ")
    words = defaults.split()
    return PipAnswer(
        index=values.get("index-url"),
        extra=tuple(values.get("extra-index-url", "").split()),
        default_index=words[0].rstrip("/") + "/" if words else None,
        default_files=canonical_host(words[1]) if len(words) > 1 else None,
    )


def _pythons_with_pip() -> Iterable[tuple[str, dict[str, str]]]:
    named = (shutil.which("python3"), shutil.which("python"), "/usr/bin/python3")
    for python in dict.fromkeys(filter(None, (sys.executable, *named))):
        yield python, _environment()
    # No pip anywhere (a machine set up by uv): the copy that every CPython carries will do.
    bundled = sorted(_bundled_pip())
    if bundled:
        yield sys.executable, {**_environment(), "PYTHONPATH": str(bundled[-1])}


def _bundled_pip() -> Iterable[Path]:
    spec = find_spec("ensurepip")
    if spec is None or spec.origin is None:
        return ()
    return (Path(spec.origin).parent / "_bundled").glob("pip-*.whl")


def _pip_urls(pip: PipAnswer | None) -> list[str]:
    if pip is None:
        return []
    index = pip.index or pip.default_index
    return [url for url in (index, *pip.extra, *_uv_indexes()) if url and _is_web(url)]


def _uses_default_index(pip: PipAnswer) -> bool:
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


def ask_npm(node_tree: Path | None = None) -> NpmAnswer | None:
    """Ask the host's npm, else read the default of the one in a root tree; None without one."""
    if (npm := shutil.which("npm")) is not None:
        try:
            command = [npm, "config", "list", "--json"]
            # To read its configuration, npm would make its cache in the home and log into it.
            apart = {"NPM_CONFIG_CACHE": "/dev/null/npm", "NPM_CONFIG_LOGS_MAX": "0"}
            return parse_npm(run(command, env=_environment() | apart, timeout=_TIMEOUT).text)
        except (CommandFailed, ValueError, KeyError):
            pass
    definitions = node_tree / _NPM_DEFINITIONS if node_tree is not None else None
    if definitions is None or not definitions.is_file():
        return None
    # Read, not run: npm would write its logs into the tree, which is immutable.
    return parse_npm_definitions(definitions.read_text(errors="replace"))


def parse_npm_definitions(source: str) -> NpmAnswer | None:
    """Find the default registry in npm's own table of settings."""
    found = _NPM_DEFAULT.search(source)
    return None if found is None else NpmAnswer(registry=found.group(1), scoped=())


def parse_npm(listing: str) -> NpmAnswer:
    """Read `npm config list --json`; raises ValueError or KeyError if it is something else."""
    values = json.loads(listing)
    scoped = tuple(
        (name, str(url))
        for name, url in sorted(values.items())
        if name.startswith("@") and name.endswith(":registry")
    )
    return NpmAnswer(registry=str(values["registry"]), scoped=scoped)


def _npm_urls(npm: NpmAnswer | None) -> list[str]:
    return [] if npm is None else [npm.registry, *(url for _, url in npm.scoped)]


# apt --------------------------------------------------------------------------------------


def ask_apt() -> tuple[AptSource, ...]:
    """Ask apt for the Debian suites the host uses; empty without apt.

    Asked twice: what it has lists of, whose origin it knows, and all that it is configured with,
    as a machine that never ran `apt-get update` (an image, a container) has no lists.
    """
    ask = ["apt-get", "indextargets", "--format", _APT_FORMAT]
    try:
        fetched = run(ask, env=_environment(), timeout=_TIMEOUT)
        configured = run([*ask, "--no-release-info"], env=_environment(), timeout=_TIMEOUT)
    except CommandFailed:
        return ()
    return parse_apt(fetched.text + configured.text, on_debian=_on_debian())


def parse_apt(listing: str, *, on_debian: bool = True) -> tuple[AptSource, ...]:
    """Read `apt-get indextargets`, keeping Debian's own suites, not other vendors' lists.

    Where apt knows no origin it is told by its site's other suites; on another distribution than
    Debian, what is unknown is none of Debian's.
    """
    targets = [_target(line) for line in listing.splitlines()]
    origins = {
        (site, release): origin for site, release, _, origin in targets if origin not in _UNKNOWN
    }
    debians = {site for (site, _), origin in origins.items() if origin == "Debian"}
    if on_debian:
        known = {site for site, _ in origins}
        debians |= _like_debians([target for target in targets if target[0] not in known], debians)
    found: dict[AptSource, None] = {}
    for site, release, component, _ in targets:
        ending = next((end for end in _SUITE_ENDINGS if release.endswith(end)), "")
        ours = site in debians and origins.get((site, release), "Debian") == "Debian"
        named = component in _DEBIAN_COMPONENTS and release.removesuffix(ending).isalpha()
        if ours and named and _is_web(site):
            found[AptSource(site, ending, component)] = None
    return tuple(found)


_Target = tuple[str, str, str, str]


def _target(line: str) -> _Target:
    """Site, release, component and origin of a line."""
    site, release, component, origin = (line.split("\t") + [""] * 4)[:4]
    return _first_mirror(site).rstrip("/"), release, component, origin


def _like_debians(unknown: Sequence[_Target], known: Set[str]) -> set[str]:
    """The sites that may be Debian's mirrors among those whose origin apt has not learned yet.

    Debian has updates and security suites; vendors that name theirs after Debian's have not.
    """
    updated = {site for site, release, *_ in unknown if release.endswith(_SUITE_ENDINGS)}
    return updated if updated or known else {site for site, *_ in unknown}


def _on_debian() -> bool:
    """Whether this is Debian, by os-release(5)."""
    try:
        return platform.freedesktop_os_release()["ID"] == "debian"
    except OSError:
        return False


def _first_mirror(site: str) -> str:
    """The first web address of a mirror list, as Debian's cloud images name one (apt-transport-
    mirror(1)); any other site as it is.
    """
    if not site.startswith(_MIRROR_LIST):
        return site
    try:
        words = Path(site.removeprefix(_MIRROR_LIST)).read_text().split()
    except (OSError, UnicodeDecodeError):
        return site
    return next((word for word in words if _is_web(word)), site)


# Addresses --------------------------------------------------------------------------------


def _environment() -> dict[str, str]:
    """Return what the package managers' own configuration is found by."""
    passed = {name: value for name, value in os.environ.items() if name.startswith(_PASSED_ON)}
    keep = {name: os.environ[name] for name in ("HOME", "PATH") if name in os.environ}
    return {**passed, **keep}


def _is_web(url: str) -> bool:
    return urlsplit(url).scheme in ("http", "https")


def _carried(url: str) -> bool:
    return _is_web(url) and urlsplit(url).username is None


def _over_https(url: str) -> str:
    return "https://" + url.partition("://")[2]


def _domain(url: str) -> tuple[str | None, str | None]:
    """Return the domain of an address, and a note if the proxy will refuse it all the same."""
    parts = urlsplit(url)
    host = canonical_host(parts.hostname or "")
    if host is None:
        return None, f"{parts.hostname} is an address: sandboxes reach package mirrors by name only"
    if parts.scheme != "https" or (parts.port or TLS_PORT) != TLS_PORT:
        return host, f"{host} is not on HTTPS port {TLS_PORT}, all that network restricted reaches"
    if parts.username is not None:
        return host, f"{host} needs credentials, which sandboxes are not given"
    return host, None

"""This machine's apt, pip and npm configuration, made fit for a guest.

Nothing is written down here about mirrors: whatever this machine is configured with, the guest is.
"""

from __future__ import annotations

import configparser
import re
from collections.abc import Iterable
from io import StringIO
from pathlib import Path

from hostruntime.host.run import run

ETC = Path("/etc")
# What says how to fetch, of all the settings (apt.conf(5)): not hooks, nor packages' own rules.
FETCHING = re.compile(r"Acquire::(http|https|ftp|Retries|Check-|ForceIPv|Proxy)", re.IGNORECASE)
_LOCAL = re.compile(r"^(file:|/|\.)")


class SourcesError(Exception):
    """This machine's package managers are configured in a way that a guest cannot have."""


def debian_sources(files: Iterable[Path], codename: str, wanted: str) -> list[tuple[str, str]]:
    """Debian's own sources among apt's files, for another codename: file names and texts.

    Raises SourcesError when no file has any.
    """
    found = []
    for path in files:
        text = path.read_text()
        rewritten = deb822(text, codename, wanted) if path.suffix == ".sources" else ""
        rewritten = one_line(text, codename, wanted) if path.suffix == ".list" else rewritten
        if rewritten:
            found.append((path.name, rewritten))
    if not found:
        raise SourcesError(f"apt on this machine has no source of {codename}: nothing to go by")
    return found


def deb822(text: str, codename: str, wanted: str) -> str:
    """The stanzas (deb822(5)) with suites of ``codename``, these renamed; "" if there are none."""
    kept = []
    for stanza in re.split(r"\n[ \t]*\n", text):
        suites = re.search(r"^Suites:(.*)$", stanza, re.MULTILINE | re.IGNORECASE)
        if suites is None or not any(_is_of(word, codename) for word in suites[1].split()):
            continue
        renamed = " ".join(_renamed(word, codename, wanted) for word in suites[1].split())
        kept.append(f"{stanza[: suites.start(1)]} {renamed}{stanza[suites.end(1) :]}".strip("\n"))
    return "".join(f"{stanza}\n\n" for stanza in kept)


def one_line(text: str, codename: str, wanted: str) -> str:
    """The lines of a sources.list(5) with a suite of ``codename``, it renamed; "" without any."""
    kept = []
    for line in text.splitlines():
        found = re.match(r"(deb\s+(?:\[[^]]*\]\s+)?\S+\s+)(\S+)(\s.*)$", line)
        if found is not None and _is_of(found[2], codename):
            kept.append(f"{found[1]}{_renamed(found[2], codename, wanted)}{found[3]}\n")
    return "".join(kept)


def _is_of(suite: str, codename: str) -> bool:
    return suite == codename or suite.startswith((f"{codename}-", f"{codename}/"))


def _renamed(suite: str, codename: str, wanted: str) -> str:
    return wanted + suite.removeprefix(codename) if _is_of(suite, codename) else suite


def apt_files() -> list[Path]:
    """Every file that apt takes sources from on this machine."""
    parts = sorted((ETC / "apt/sources.list.d").iterdir())
    whole = ETC / "apt/sources.list"
    return [*([whole] if whole.is_file() else []), *parts]


def codename_here() -> str:
    """This machine's own codename (os-release(5)). Raises SourcesError where it has none."""
    for line in (ETC / "os-release").read_text().splitlines():
        name, _, value = line.partition("=")
        if name == "VERSION_CODENAME":
            return value.strip('"')
    raise SourcesError("/etc/os-release names no codename: this needs a Debian machine")


def fetching_settings() -> str:
    """How this machine's apt fetches (proxies, certificates, checks), as an apt.conf(5)."""
    dumped = run(["apt-config", "dump"], timeout=60).text.splitlines()
    return "".join(f"{line}\n" for line in dumped if FETCHING.match(line))


def pip_settings(text: str) -> str:
    """A pip.conf without what lies in directories of this machine alone."""
    parser = configparser.RawConfigParser()
    parser.read_string(text)
    for section in parser.sections():
        for name, value in parser.items(section):
            words = value.split()
            kept = [word for word in words if not _LOCAL.match(word)]
            if "index" in name or name == "find-links":
                parser.set(section, name, "\n".join(kept))
                if not kept:
                    parser.remove_option(section, name)
    buffer = StringIO()
    parser.write(buffer)
    return buffer.getvalue()

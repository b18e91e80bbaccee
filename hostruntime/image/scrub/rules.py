"""What the scrub removes, as data: for each tool, what the tool itself considers disposable.

A cache may be removed if its tool has a command that clears it, and works without it. What a tool
*runs from* (environments, stores that packages are linked from, models, browsers, offline
repositories) is not a cache, whatever the directory is called, and has no rule here:
Poetry's ``virtualenvs``, npm's ``_npx``, pnpm's ``dlx`` and store, ``~/.m2``, Gradle, Cargo, Go,
Deno, Coursier, NuGet's packages, renv, ``~/.cache/huggingface``, ``~/.cache/ms-playwright`` …
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Action = Literal["remove", "remove_files", "unlink", "empty", "blank", "remove_core"]

_HOMES = ("root", "home/*")


@dataclass(frozen=True)
class Rule:
    """Apply ``action`` to the entries that match ``names`` in each of ``directories``.

    ``label`` describes what is removed; several rules may share it.  The actions:

    * ``remove`` removes files and complete directories;
    * ``remove_files`` unlinks regular files at any depth, but keeps links, and directories, which
      a service may need and be unable to create;
    * ``unlink`` unlinks anything that is not a directory;
    * ``empty`` truncates files, recursively, keeping their name, owner and mode (a daemon may be
      able to write its log but not to create it);
    * ``blank`` replaces the entry with an empty file;
    * ``remove_core`` unlinks core dumps.

    Patterns are those of fnmatch; names matching ``unless`` are spared. So is anything the image
    itself uses (:mod:`hostruntime.image.scrub.references`), unless the rule is ``unconditional``.
    ``unless_beside`` names siblings that depend on what the rule removes; ``unless_anywhere`` names
    files whose presence anywhere in the image shows that something depends on it.
    """

    label: str
    directories: tuple[str, ...]
    names: tuple[str, ...]
    action: Action = "remove"
    unless: tuple[str, ...] = ()
    unless_beside: tuple[str, ...] = ()
    unless_anywhere: tuple[str, ...] = ()
    unconditional: bool = False


def _home(path: str) -> tuple[str, ...]:
    return tuple(f"{home}/{path}" for home in _HOMES)


# Plug'n'Play's map from packages to the zip files in Yarn's cache that they run from.
_YARN_PNP = (".pnp.cjs", ".pnp.js")

_ACCOUNT_BACKUPS = ("passwd.bak", "group.bak", "shadow.bak", "gshadow.bak")

_SYSTEM_PACKAGES = (
    Rule("apt package lists", ("var/lib/apt/lists",), ("*",), "remove_files"),
    Rule("downloaded apt packages", ("var/cache/apt/archives",), ("*",), "remove_files"),
    Rule("apt caches", ("var/cache/apt",), ("*.bin",), "unlink"),
    Rule("package databases' backups", ("var/lib/dpkg", "var/lib/apt"), ("*-old",), "unlink"),
    Rule("package databases' backups", ("var/cache/debconf",), ("*-old",), "unlink"),
    # Debian's dpkg-db-backup and passwd write these; other programs may store backups there, too.
    Rule(
        "package databases' backups",
        ("var/backups",),
        ("alternatives.tar.*", "apt.extended_states.*", "dpkg.*", *_ACCOUNT_BACKUPS),
        "unlink",
    ),
)

_LANGUAGE_PACKAGES = (
    # `pip cache purge`, `uv cache clean`, `pipenv --clear`, `poetry cache clear`, `pdm cache
    # clear`. PDM's cached packages may be in use through a .pth file, so they stay.
    Rule("pip cache", _home(".cache"), ("pip",)),
    Rule("uv cache", _home(".cache"), ("uv",)),
    Rule("pipenv cache", _home(".cache"), ("pipenv",)),
    Rule("Poetry cache", _home(".cache/pypoetry"), ("cache", "artifacts")),
    Rule("PDM cache", _home(".cache/pdm"), ("http", "hashes*", "metadata", "wheels")),
    # `npm cache clean`. npx and `pnpm dlx` also use the cache, for packages run from elsewhere.
    Rule("npm cache", _home(".npm"), ("_logs", "_update-notifier-last-checked")),
    Rule("npm cache", _home(".npm"), ("_cacache",), unless_beside=("_npx",)),
    Rule("pnpm cache", _home(".cache/pnpm"), ("metadata*",), unless_beside=("dlx",)),
    # `yarn cache clean`, for Yarn 1 and later versions. A project's own cache stays.
    Rule("Yarn cache", (*_home(".cache"), "usr/local/share/.cache"), ("yarn",)),
    Rule("Yarn cache", _home(".yarn/berry"), ("cache",), unless_anywhere=_YARN_PNP),
    # `composer clear-cache`, `dotnet nuget locals http-cache --clear`.
    Rule("Composer cache", _home(".cache/composer"), ("files", "repo")),
    Rule("NuGet cache", _home(".local/share/NuGet"), ("http-cache", "v3-cache", "plugins-cache")),
)

# By the Filesystem Hierarchy Standard, applications must cope with the loss of files there, but
# debconf stores its database in it, and fontconfig's cache makes a program's first start fast.
_SYSTEM_CACHES = (
    Rule("manual page index", ("var/cache",), ("man",), "remove_files"),
    Rule(
        "system caches",
        ("var/cache",),
        ("*",),
        "remove_files",
        unless=("apt", "debconf", "fontconfig", "man"),
    ),
)

_LOGS = (
    Rule("logs", ("var/log/apt", "var/log/journal"), ("*",), "remove_files"),
    Rule(
        "logs",
        ("var/log",),
        ("dpkg.log*", "alternatives.log*", "bootstrap.log*", "*.gz", "*.old", "*.[0-9]"),
        "unlink",
    ),
    Rule("logs", ("var/log",), ("*",), "empty"),
)

_TRACES = (
    Rule("temporary files", ("tmp", "var/tmp", "workspace"), ("*",)),
    Rule("process id files", ("run", "run/*"), ("*.pid",), "unlink"),
    Rule("core dumps", ("", *_HOMES), ("core", "core.*"), "remove_core"),
    Rule(
        "shell and program history",
        _HOMES,
        (".*_history", ".wget-hsts", ".lesshst", ".viminfo", ".sudo_as_admin_successful"),
        "unlink",
        unconditional=True,
    ),
)

# What must be unique to every machine; hostruntime/image/identity.py generates it.
_IDENTITIES = (
    Rule("machine ids", ("etc",), ("machine-id",), "blank", unconditional=True),
    Rule("machine ids", ("var/lib/dbus",), ("machine-id",), unconditional=True),
    Rule(
        "SSH host keys",
        ("etc/ssh",),
        ("ssh_host_*_key", "ssh_host_*_key.pub"),
        unconditional=True,
    ),
    Rule(
        "random seeds",
        ("var/lib/systemd",),
        ("random-seed", "credential.secret"),
        unconditional=True,
    ),
)

RULES: tuple[Rule, ...] = (
    *_SYSTEM_PACKAGES,
    *_LANGUAGE_PACKAGES,
    *_SYSTEM_CACHES,
    *_LOGS,
    *_TRACES,
    *_IDENTITIES,
)

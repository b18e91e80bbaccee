"""Find a CPython 3.12 for the Python bases, and relocate it to /usr/local.

Candidates, in order: the one named in ``ORKESTR_PYTHON312``, the interpreter the agent runs on,
pyenv's, uv's, ``/usr/local`` and ``/opt``, and finally one downloaded by ``uv python install``.
Whether one works in the image (it may need a newer C library) is checked there, by running it.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hostruntime.errors import HostFault
from hostruntime.host.run import CommandFailed, run

VERSION = "3.12"
TARGET = Path("usr/local")
_EXECUTABLE = f"python{VERSION}"
_LIBRARY = f"lib/python{VERSION}"
_UV_TIMEOUT = 600.0
# Not needed at run time, or needing X11.
_EXCLUDED = frozenset(
    {
        "__pycache__",
        "EXTERNALLY-MANAGED",
        "idle_test",
        "idlelib",
        "site-packages",
        "test",
        "tests",
        "tkinter",
        "turtle.py",
        "turtledemo",
    }
)
_EXCLUDED_PATTERN = re.compile(r"_tkinter\..*|.*\.a|_test.*\.so|_ctypes_test.*\.so|xxlimited.*\.so")
# Debian 12's package of each library that CPython's own extension modules link to.
_PACKAGES: Mapping[str, str] = {
    "libbz2.so.1.0": "libbz2-1.0",
    "libcrypt.so.1": "libcrypt1",
    "libcrypto.so.3": "libssl3",
    "libdb-5.3.so": "libdb5.3",
    "libedit.so.2": "libedit2",
    "libexpat.so.1": "libexpat1",
    "libffi.so.8": "libffi8",
    "libgcc_s.so.1": "libgcc-s1",
    "libgdbm.so.6": "libgdbm6",
    "libgdbm_compat.so.4": "libgdbm-compat4",
    "liblzma.so.5": "liblzma5",
    "libmpdec.so.3": "libmpdec3",
    "libncurses.so.6": "libncurses6",
    "libncursesw.so.6": "libncursesw6",
    "libnsl.so.2": "libnsl2",
    "libpanel.so.6": "libncurses6",
    "libpanelw.so.6": "libncursesw6",
    "libreadline.so.8": "libreadline8",
    "libsqlite3.so.0": "libsqlite3-0",
    "libssl.so.3": "libssl3",
    "libstdc++.so.6": "libstdc++6",
    "libtinfo.so.6": "libtinfo6",
    "libtirpc.so.3": "libtirpc3",
    "libuuid.so.1": "libuuid1",
    "libz.so.1": "zlib1g",
}
# The install prefix and compiler of python-build-standalone (uv's source), unless uv patched them.
_STANDALONE_PREFIX = re.compile(r"(?<![\w/])/install(?=[/'\" ]|$)", re.MULTILINE)
_CLANG = re.compile(r"(?<![\w-])clang(?=[' ])")
_LDD_LINE = re.compile(r"\s*(\S+) => (\S.*?) \(0x[0-9a-f]+\)")


class UnsuitablePython(HostFault):
    """A CPython tree that cannot be used; the message says why."""


@dataclass(frozen=True)
class PythonTree:
    """A CPython 3.12 on the host: its prefix, and what it links to.

    ``libraries`` are its own shared libraries, to be copied; ``packages`` are Debian packages.
    """

    prefix: Path
    packages: tuple[str, ...]
    libraries: tuple[Path, ...]


def find_on_host(environment: Mapping[str, str] = os.environ) -> Iterator[Path]:
    """Yield prefixes that contain a CPython 3.12, in order of preference, without duplicates."""
    seen: set[Path] = set()
    for prefix in _candidates(environment):
        resolved = prefix.resolve()
        usable = (resolved / "bin" / _EXECUTABLE).is_file() and (resolved / _LIBRARY).is_dir()
        if usable and resolved not in seen and resolved != Path("/usr"):
            seen.add(resolved)
            yield resolved


def _candidates(environment: Mapping[str, str]) -> Iterator[Path]:
    if named := environment.get("ORKESTR_PYTHON312"):
        path = Path(named)
        yield path.resolve().parent.parent if path.is_file() else path
    yield Path(sys.base_prefix)
    homes = [Path("/root"), *sorted(Path("/home").glob("*"))]
    pyenvs = [environment.get("PYENV_ROOT"), *(home / ".pyenv" for home in homes)]
    yield from _newest_first(pyenvs, f"versions/{VERSION}*")
    uvs = [
        environment.get("UV_PYTHON_INSTALL_DIR"),
        *(home / ".local/share/uv/python" for home in homes),
    ]
    yield from _newest_first(uvs, f"cpython-{VERSION}*")
    yield Path("/usr/local")
    yield from _newest_first(["/opt"], "*")


def _newest_first(roots: Iterable[str | Path | None], pattern: str) -> Iterator[Path]:
    for root in roots:
        if root is not None:
            yield from sorted(Path(root).glob(pattern), key=_version_key, reverse=True)


def _version_key(path: Path) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", path.name)]


def install_with_uv(directory: Path) -> Path:
    """Install a CPython 3.12 into ``directory`` with uv; return its prefix.  Raises HostFault."""
    uv = shutil.which("uv") or shutil.which("uv", path=str(Path(sys.executable).parent))
    if uv is None:
        raise UnsuitablePython("uv, which could install one, is missing")
    passed = {name: value for name, value in os.environ.items() if name.startswith(("UV_", "SSL_"))}
    command = [uv, "python", "install", "--no-bin", "--install-dir", str(directory), VERSION]
    run(command, env=passed, timeout=_UV_TIMEOUT)
    for prefix in _newest_first([directory], f"cpython-{VERSION}*"):
        return prefix.resolve()
    raise UnsuitablePython("uv reported success, but installed nothing")


def inspect(prefix: Path) -> PythonTree:
    """Find what a CPython tree needs.  Raises UnsuitablePython."""
    header = prefix / f"include/python{VERSION}/Python.h"
    if not header.is_file():
        raise UnsuitablePython(f"{header} is missing, so no C extension could be built")
    packages: set[str] = {"netbase", "tzdata"}
    libraries: dict[str, Path] = {}
    for name, path in _linked_libraries(_binaries(prefix)):
        if path.is_relative_to(prefix) or path.is_relative_to("/usr/local"):
            libraries[name] = path
        elif name in _PACKAGES:
            packages.add(_PACKAGES[name])
        # Anything else belongs to the C library, or is a dependency of one of these packages: ldd
        # is recursive. If something is still missing, loading the modules in the image fails.
    own = tuple(
        path for name, path in sorted(libraries.items()) if not name.startswith("libpython")
    )
    return PythonTree(prefix, tuple(sorted(packages)), own)


def _binaries(prefix: Path) -> list[Path]:
    modules = [
        path for path in prefix.glob(f"{_LIBRARY}/lib-dynload/*.so") if not _is_excluded(path)
    ]
    return [prefix / "bin" / _EXECUTABLE, *sorted(modules), *prefix.glob("lib/libpython3*.so*")]


def _linked_libraries(binaries: Sequence[Path]) -> Iterator[tuple[str, Path]]:
    try:
        listing = run(["ldd", *map(str, binaries)], timeout=60.0, check=False).text
    except CommandFailed as error:
        raise UnsuitablePython(error.detail) from error
    for line in listing.splitlines():
        if "=> not found" in line:
            raise UnsuitablePython(f"it links to {line.split()[0]}, which this host does not have")
        if found := _LDD_LINE.match(line):
            yield found[1], Path(found[2]).resolve()


def install(tree: PythonTree, layer: Path) -> None:
    """Copy a CPython tree to ``usr/local`` of a writable layer and adapt it to that prefix."""
    target = layer / TARGET
    for directory in ("bin", "lib/pkgconfig", "include"):
        (target / directory).mkdir(parents=True)
    for name in (_EXECUTABLE, f"{_EXECUTABLE}-config"):
        if (tree.prefix / "bin" / name).is_file():
            shutil.copy2(tree.prefix / "bin" / name, target / "bin" / name)
    shutil.copytree(
        tree.prefix / f"include/python{VERSION}", target / f"include/python{VERSION}", symlinks=True
    )
    shutil.copytree(tree.prefix / _LIBRARY, target / _LIBRARY, symlinks=True, ignore=_ignored)
    (target / _LIBRARY / "site-packages").mkdir()
    for library in [*tree.prefix.glob("lib/libpython3*.so*"), *tree.libraries]:
        shutil.copy2(library, target / "lib" / library.name, follow_symlinks=False)
    for description in tree.prefix.glob("lib/pkgconfig/python*.pc"):
        shutil.copy2(description, target / "lib/pkgconfig", follow_symlinks=False)
    _strip(target)
    _rewrite_prefix(target, str(tree.prefix))
    _chown_to_root(layer)


def _ignored(_: str, names: list[str]) -> set[str]:
    return {name for name in names if _is_excluded(Path(name))}


def _is_excluded(path: Path) -> bool:
    return path.name in _EXCLUDED or _EXCLUDED_PATTERN.fullmatch(path.name) is not None


def _strip(target: Path) -> None:
    """Strip debug symbols, most of a self-compiled Python's size, if the host has strip(1)."""
    if shutil.which("strip") is None:
        return
    found = [*target.glob("bin/*"), *target.glob("lib/*.so*"), *target.glob(f"{_LIBRARY}/**/*.so")]
    programs = [path for path in found if not path.is_symlink() and _is_elf(path)]
    run(["strip", "--strip-debug", *map(str, programs)], timeout=120.0)


def _is_elf(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"\x7fELF"


def _rewrite_prefix(target: Path, prefix: str) -> None:
    """Set the prefix in build configuration files to /usr/local, and the compiler to cc."""
    library = target / _LIBRARY
    texts = [
        target / "bin" / f"{_EXECUTABLE}-config",
        *library.glob("_sysconfigdata_*.py"),
        *library.glob("config-*/Makefile"),
        *library.glob("config-*/python-config.py"),
        *target.glob("lib/pkgconfig/*.pc"),
    ]
    for path in texts:
        if path.is_file() and not path.is_symlink():
            text = path.read_text().replace(prefix, f"/{TARGET}")
            text = _STANDALONE_PREFIX.sub(f"/{TARGET}", text)
            path.write_text(_CLANG.sub("cc", text))


def _chown_to_root(layer: Path) -> None:
    for directory, names, files in os.walk(layer):
        for path in (Path(directory, name) for name in (".", *names, *files)):
            os.chown(path, 0, 0, follow_symlinks=False)
            if not path.is_symlink():
                executable = path.is_dir() or path.stat().st_mode & 0o111
                path.chmod(0o755 if executable else 0o644)

"""The built-in base images, as data.

A base is a recipe over another base, built by the same code as a template; the first of them is
Debian itself. Changing anything here changes the definition's digest, and the base (with those
built on it) is rebuilt when it is next requested.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

DEBIAN_SUITE = "bookworm"


@dataclass(frozen=True)
class BaseDefinition:
    """One base. ``provider`` selects the code that supplies what a recipe cannot download.

    ``packages`` are Debian packages, installed by mmdebstrap with ``dpkg_options`` (dpkg.cfg(5))
    and the answers ``debconf`` (debconf-set-selections(1)); then ``directories`` are created.
    Before the recipe, ``files`` are written (path, mode, text), and Node.js with npm is copied from
    the base ``node_from``. In recipe steps, ``{packages}`` is replaced by the packages that the
    provider requires.

    A base ``on_request`` is not made when the installation starts, but when somebody first asks.
    """

    name: str
    title: str
    description: str
    parent: str | None = None
    provider: Literal["debian", "cpython", "npm"] | None = None
    packages: tuple[str, ...] = ()
    dpkg_options: tuple[str, ...] = ()
    debconf: tuple[str, ...] = ()
    directories: tuple[str, ...] = ()
    files: tuple[tuple[str, int, str], ...] = ()
    recipe: tuple[str, ...] = ()
    node_from: str | None = None
    on_request: bool = False


_APT_INSTALL = "apt-get update && apt-get install -y --no-install-recommends"

# In addition to the minimal system: common tools of recipes and agents, and what programs from
# outside Debian expect on every machine.
_DEBIAN_PACKAGES = (
    # To download, to add the keys of other repositories, to unpack, to inspect the system.
    *("ca-certificates", "curl", "wget", "git", "openssh-client", "gnupg"),
    *("bzip2", "unzip", "xz-utils", "less", "procps"),
    # Install scripts query the Debian release, switch users, and need a UTF-8 locale with a
    # language; getprotobyname(3) and getservbyname(3) need their tables.
    *("lsb-release", "sudo", "locales", "netbase"),
    # Node's binaries, which Playwright brings too, are linked to it.
    "libatomic1",
)
# Manuals and translations are useless in a sandbox; licences stay. This also applies to apt inside.
_DPKG_OPTIONS = (
    "path-exclude=/usr/share/man/*",
    "path-exclude=/usr/share/info/*",
    "path-exclude=/usr/share/doc/*",
    "path-include=/usr/share/doc/*/copyright",
    "path-exclude=/usr/share/locale/*",
    # locale-gen(8) reads it.
    "path-include=/usr/share/locale/locale.alias",
)
_DEBIAN_FILES = (
    # There is no init in a container: packages must not try to start their daemons
    # (invoke-rc.d(8), and Debian's policy-rc.d interface).
    ("usr/sbin/policy-rc.d", 0o755, "#!/bin/sh\nexit 101\n"),
    # The first would interfere with mmdebstrap; the second keeps progress bars out of build logs.
    (
        "etc/apt/apt.conf.d/70orkestr",
        0o644,
        'APT::Keep-Downloaded-Packages "false";\nDpkg::Use-Pty "0";\n',
    ),
)

# Detects a missing or outdated library before a user's recipe does.
_LOAD_EVERY_MODULE = (
    "import importlib, pathlib, sysconfig; "
    'built = pathlib.Path(sysconfig.get_path("stdlib"), "lib-dynload").glob("*.so"); '
    '[importlib.import_module(path.name.partition(".")[0]) for path in built]; '
    "import bz2, ctypes, hashlib, lzma, readline, sqlite3, ssl, uuid, zlib"
)

_KERNEL_DIRECTORY = "usr/local/share/jupyter/kernels/javascript"
_KERNEL_FILES = ("kernel.json", "kernel.py", "runner.cjs")
_KERNEL_SOURCES = Path(__file__).with_name("javascript")

# Where matplotlib keeps the list of fonts, whose making takes it seconds.
_FONTS = "/usr/local/share/matplotlib"
_RUN_EACH_KERNEL = """HOME=/tmp python - <<'EOF'
import jupyter_client, sys
for name, code, value in (("python3", "6 * 7", "42"), ("javascript", "await 6 * 7", "42")):
    with jupyter_client.run_kernel(kernel_name=name) as client:
        found = []
        client.execute_interactive(code, output_hook=found.append, timeout=120)
        values = [each["content"].get("data", {}).get("text/plain") for each in found]
        if value not in values:
            sys.exit(f"{name} gave {values}")
EOF"""

_DEFINITIONS = (
    BaseDefinition(
        name="debian-12",
        title="Debian 12",
        description="Debian 12 (bookworm) with curl and git. apt works.",
        provider="debian",
        packages=_DEBIAN_PACKAGES,
        dpkg_options=_DPKG_OPTIONS,
        debconf=("locales locales/locales_to_be_generated multiselect en_US.UTF-8 UTF-8",),
        # Excluded by the options above, but update-alternatives(1) links into them, and no JRE
        # installs without them.
        directories=tuple(f"usr/share/man/man{section}" for section in range(1, 10)),
        files=_DEBIAN_FILES,
    ),
    BaseDefinition(
        name="python-3.12-bare",
        title="Python 3.12 (bare)",
        description="CPython 3.12 and pip on Debian 12, and nothing else installed.",
        parent="debian-12",
        provider="cpython",
        recipe=(
            f"{_APT_INSTALL} {{packages}} && ldconfig",
            f"python3.12 -c '{_LOAD_EVERY_MODULE}'",
            "python3.12 -m ensurepip --default-pip && python3.12 -m pip install --upgrade pip",
            "ln -sf python3.12 /usr/local/bin/python3 && ln -sf python3.12 /usr/local/bin/python",
            "python -m compileall -q -j 0 /usr/local/lib/python3.12 || true",
            "python -m venv /tmp/check && /tmp/check/bin/pip --version && pip --version",
        ),
    ),
    BaseDefinition(
        name="python-3.12",
        title="Python 3.12",
        description="CPython 3.12 with pip and common libraries (requests, httpx, PyYAML, …).",
        parent="python-3.12-bare",
        # Small, mostly pure Python and commonly used: HTTP, configuration, dates, HTML, text. The
        # numeric stack is left to templates.
        recipe=(
            "pip install requests httpx pyyaml python-dateutil beautifulsoup4 jinja2 tabulate tqdm",
            "python -c 'import requests, httpx, yaml, dateutil, bs4, jinja2, tabulate, tqdm'",
        ),
    ),
    BaseDefinition(
        name="node-22",
        title="Node.js 22",
        description="Node.js 22 with npm and corepack on Debian 12.",
        parent="debian-12",
        provider="npm",
        # Debian's npm installs the registry's Node binaries and current npm, and is then removed.
        # The binary must be in /usr/local/bin itself: npm's global prefix is two levels above it.
        recipe=(
            f"{_APT_INSTALL} npm",
            'npm install --no-save --prefix /tmp/node "node-linux-$(node -p process.arch)@22" && '
            "npm install --global --prefix /usr/local npm@10 corepack && "
            "cp -R --no-preserve=ownership /tmp/node/node_modules/node-linux-*/bin "
            "/tmp/node/node_modules/node-linux-*/include /usr/local/",
            # Node 22 ships corepack with its shims disabled: enabled, they would break
            # `npm install -g yarn`.
            "apt-get purge -y --auto-remove npm nodejs && hash -r && corepack disable && "
            "! command -v yarn && ! command -v pnpm && "
            'test /usr/local = "$(npm prefix --global)" && node --version && npm --version',
        ),
    ),
    BaseDefinition(
        name="code-interpreter",
        title="Code interpreter",
        description="Jupyter kernels for Python 3.12 (numpy, pandas, matplotlib, pillow, scipy, "
        "scikit-learn) and JavaScript (Node.js 22).",
        parent="python-3.12",
        node_from="node-22",
        # It is large, takes minutes, and many installations never use it.
        on_request=True,
        files=tuple(
            (f"{_KERNEL_DIRECTORY}/{name}", 0o644, (_KERNEL_SOURCES / name).read_text())
            for name in _KERNEL_FILES
        ),
        recipe=(
            "pip install ipykernel numpy pandas matplotlib pillow scipy scikit-learn",
            f"mkdir -p {_FONTS} && echo MPLCONFIGDIR={_FONTS} >>/etc/environment && "
            f"MPLCONFIGDIR={_FONTS} python -c 'import matplotlib.pyplot, numpy, pandas, PIL, "
            "scipy.stats, sklearn.linear_model'",
            _RUN_EACH_KERNEL,
        ),
    ),
)

# For a host without npm: ask Debian's npm for its default registry.
NPM_REGISTRY_FILE = "root/npm-registry"
NPM_QUERY_RECIPE = (f"{_APT_INSTALL} npm", f"npm config get registry >/{NPM_REGISTRY_FILE}")

BASES: Mapping[str, BaseDefinition] = {base.name: base for base in _DEFINITIONS}


def definition_digest(base: BaseDefinition) -> str:
    """Return a digest (hexadecimal) of a base's definition and those of all bases below it."""
    parent = BASES[base.parent] if base.parent is not None else None
    below = definition_digest(parent) if parent is not None else DEBIAN_SUITE
    fields = asdict(base)
    # When it is made changes nothing in it; and what was made before there was any other base to
    # copy from is still what its definition says.
    del fields["on_request"]
    if base.node_from is None:
        del fields["node_from"]
    else:
        fields["node_from"] = definition_digest(BASES[base.node_from])
    record = json.dumps([below, fields], sort_keys=True)
    return hashlib.sha256(record.encode()).hexdigest()

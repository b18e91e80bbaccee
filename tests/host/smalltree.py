"""An image tree that is just enough to run Python in: made of the host's own, in a second."""

from __future__ import annotations

import re
import shutil
import sysconfig
from pathlib import Path

from hostruntime.host.run import run

PYTHON = "/usr/bin/python3"
_DIRECTORIES = ("dev", "proc", "sys", "tmp", "etc", "root", "run", "var", "usr/bin", "usr/lib")
_SKIPPED = shutil.ignore_patterns(
    "__pycache__", "test", "tests", "dist-packages", "site-packages", "config-*", "idlelib", "*.a"
)


def make_small_tree(root: Path) -> Path:
    """Make a root tree with the host's Debian Python and the libraries it needs; return it."""
    for name in (
        "dev",
        "proc",
        "sys",
        "tmp",
        "etc",
        "root",
        "run",
        "var/tmp",
        "usr/bin",
        "usr/lib",
    ):
        (root / name).mkdir(parents=True)
    for name in ("bin", "lib", "lib64", "sbin"):
        (root / name).symlink_to(f"usr/{name if name != 'sbin' else 'bin'}")
    (root / "usr/lib64").mkdir()
    (root / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534::/:\n")
    binary = Path(PYTHON).resolve()
    shutil.copy2(binary, root / "usr/bin" / binary.name)
    (root / "usr/bin/python3").symlink_to(binary.name)
    library = Path(f"/usr/lib/{binary.name}")
    shutil.copytree(library, root / "usr/lib" / binary.name, ignore=_SKIPPED)
    for needed in _libraries(binary, library / "lib-dynload"):
        target = root / str(needed).lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(needed.resolve(), target)
    return root


def _libraries(binary: Path, extensions: Path) -> set[Path]:
    wanted = [str(binary), *(str(path) for path in extensions.glob("*.so"))]
    listed = run(["ldd", *wanted], timeout=30).text
    found = {Path(text) for text in re.findall(r"(/\S+\.so\S*) \(", listed)}
    triplet = sysconfig.get_config_var("MULTIARCH")
    # The resolver's plugins are loaded by name, which ldd does not see (nsswitch.conf(5)).
    return found | set(Path(f"/usr/lib/{triplet}").glob("libnss_[df]*.so.2"))

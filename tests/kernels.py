"""Recipes that give a small image the kernels of the base ``code-interpreter``."""

from __future__ import annotations

import base64

from hostruntime.build.bases.definitions import BASES

_FILES = BASES["code-interpreter"].files
# Debian's Node.js, which is older than the base's, and quicker to get.
_NODE = "apt-get update && apt-get install -y --no-install-recommends nodejs"


def _written(path: str, text: str) -> str:
    encoded = base64.b64encode(text.encode()).decode()
    return f"mkdir -p $(dirname /{path}) && echo {encoded} | base64 -d >/{path}"


IPYKERNEL = "pip install --no-cache-dir ipykernel"
JAVASCRIPT = (_NODE, " && ".join(_written(path, text) for path, _, text in _FILES))

"""The commands of the public documentation, verbatim but for host, key and ids."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from typing import Any

from tests.stack import Stack

HOST = "https://api.orkestr.eu"

CREATE = r"""
curl -X POST https://api.orkestr.eu/v1/templates \
  -H "Authorization: Bearer $ORKESTR_API_KEY" \
  -H "Content-Type: application/json" \
  -d '{
    "name": "data-stack",
    "base_template": "python-3.12",
    "recipe": [
      "pip install pandas numpy pyarrow",
      "echo \"ready\" > /root/.template-built"
    ],
    "network": "restricted"
  }'
"""
POLL = r"""
curl https://api.orkestr.eu/v1/templates/tmpl_01J... \
  -H "Authorization: Bearer $ORKESTR_API_KEY"
"""
LIST = r"""
curl https://api.orkestr.eu/v1/templates \
  -H "Authorization: Bearer $ORKESTR_API_KEY"
"""
AGENT = r"""
from orkestr import Sandbox

# Pass the template id wherever you'd pass a built-in name.
with Sandbox.create(template="tmpl_01J...") as sbx:
    result = sbx.exec("python -c 'import pandas; print(pandas.__version__)'")
    print(result.stdout)  # already installed - no pip at boot
"""
BOOT = r"""
curl -X POST https://api.orkestr.eu/v1/sandboxes \
  -H "Authorization: Bearer $ORKESTR_API_KEY" \
  -H "Content-Type: application/json" \
  -d '{ "template": "tmpl_01J...", "size": "small" }'
"""
DELETE = r"""
curl -X DELETE https://api.orkestr.eu/v1/templates/tmpl_01J... \
  -H "Authorization: Bearer $ORKESTR_API_KEY"
"""


class Reader:
    """Somebody who follows the documentation at a terminal."""

    def __init__(self, stack: Stack) -> None:
        self._url = stack.url
        self._environment = {
            **os.environ,
            "ORKESTR_BASE_URL": stack.url,
            "ORKESTR_API_KEY": stack.api_key,
        }

    def curl(self, command: str, template: str = "") -> Any:
        text = command.replace(HOST, self._url).replace("tmpl_01J...", template)
        answer = self._run(["bash", "-c", text])
        return json.loads(answer) if answer else None

    def python(self, program: str, template: str) -> str:
        return self._run([sys.executable, "-c", program.replace("tmpl_01J...", template)])

    def _run(self, command: list[str]) -> str:
        done = subprocess.run(command, env=self._environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout


def test_the_documented_example_works_as_written(stack: Stack) -> None:
    reader = Reader(stack)
    created = reader.curl(CREATE)
    asked = time.monotonic()
    template = created["id"]
    assert template.startswith("tmpl_01")
    assert created["status"] == "building"
    try:
        while (found := reader.curl(POLL, template))["status"] == "building":
            assert time.monotonic() - asked < 300
            time.sleep(0.5)
        assert found["status"] == "ready", found
        assert template in [row["id"] for row in reader.curl(LIST)["templates"]]
        version = reader.python(AGENT, template).strip()
        assert version.split(".")[0].isdecimal(), version
        booted = reader.curl(BOOT, template)
        assert (booted["status"], booted["template"], booted["cpu"]) == ("running", template, 1)
        with stack.client() as client:
            assert client.delete(f"/v1/sandboxes/{booted['id']}").is_success
    finally:
        reader.curl(DELETE, template)
    gone = reader.curl(POLL, template)
    assert gone["code"] == "not_found"

"""The code interpreter by the official SDK, unmodified, in a template that has ipykernel."""

from __future__ import annotations

import pytest
from orkestr import Sandbox
from orkestr.errors import InterpreterUnavailable

from tests.clients.making import Sandboxes, Templates

TABLE = """
class Table:
    def _repr_html_(self):
        return "<table></table>"
    def _repr_png_(self):
        return b"\\x89PNG"
Table()
"""


def test_code_runs_in_kernels_that_keep_what_they_have(
    templates: Templates, sandboxes: Sandboxes
) -> None:
    image = templates.ready("python-3.12-bare", "pip install --no-cache-dir ipykernel")
    sandbox = sandboxes.boot(template=image)
    first = sandbox.run_code("x = 41\nprint('größe')")
    assert (first.stdout, first.text, first.error, first.context_id) == (
        "größe\n",
        None,
        None,
        "default",
    )
    ran = sandbox.run_code("x + 1")
    assert (ran.text, ran.execution_count, ran.truncated) == ("42", 2, [])
    [table] = sandbox.run_code(TABLE).results
    assert (table.type, table.html, table.png_bytes()) == (
        "image_png",
        "<table></table>",
        b"\x89PNG",
    )
    failed = sandbox.run_code("1 / 0").error
    assert failed is not None
    assert failed.name == "ZeroDivisionError"
    assert any("1 / 0" in line for line in failed.traceback)
    late = sandbox.run_code("import time; time.sleep(60)", timeout_seconds=1)
    assert late.interrupted
    *events, done = sandbox.run_code_stream("for n in range(2): print(n)\nx")
    assert "".join(each.text or "" for each in events) == "0\n1\n"
    assert done.execution is not None
    assert (done.kind, done.execution.text, done.execution.stdout) == ("done", "41", "0\n1\n")
    contexts_hold_apart(sandbox)
    sandbox.pause()
    assert len(sandbox.code_contexts()) == 1
    sandbox = Sandbox.resume(sandbox.id, client=sandboxes.client)
    assert sandbox.run_code("x").text == "41"
    plain = sandboxes.boot(template="debian-12")
    with pytest.raises(InterpreterUnavailable):
        plain.run_code("1")
    with pytest.raises(InterpreterUnavailable):
        list(plain.run_code_stream("1"))


def contexts_hold_apart(sandbox: Sandbox) -> None:
    context = sandbox.create_code_context(cwd="/tmp")
    assert context.run_code("import os; os.getcwd()").text == "'/tmp'"
    error = context.run_code("x").error
    assert error is not None
    assert error.name == "NameError"
    context.run_code("y = 1")
    assert context.restart().alive
    assert context.run_code("'y' in globals()").text == "False"
    known = {each.id: each for each in sandbox.code_contexts()}
    assert set(known) == {"default", context.id}
    assert (known[context.id].cwd, known[context.id].executions) == ("/tmp", 1)
    context.remove()
    assert [each.id for each in sandbox.code_contexts()] == ["default"]

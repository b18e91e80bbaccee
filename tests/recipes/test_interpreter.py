"""The base ``code-interpreter`` itself, made on request, by the official SDK: `make recipes`."""

from __future__ import annotations

import pytest
from orkestr import OrkestrClient, Sandbox
from orkestr.errors import FleetFull

from tests.clients.making import Sandboxes, Templates
from tests.stack import Stack

NAME = "code-interpreter"
FIGURE = """
import matplotlib.pyplot as plt, numpy, PIL, scipy.stats, sklearn.linear_model
plt.plot([1, 2]); plt.show()
"""


def test_it_is_made_when_it_is_first_used_and_runs_both_languages(
    stack: Stack, sdk: OrkestrClient, templates: Templates, sandboxes: Sandboxes
) -> None:
    [base] = [each for each in stack.host().bases() if each.name == NAME]
    if base.state != "ready":
        assert base.state == "missing"
        with pytest.raises(FleetFull, match=NAME):
            Sandbox.create(template=NAME, client=sdk, max_retries=0)
    image = templates.ready(NAME, "pip install humanize && npm install --prefix /opt left-pad")
    messages = [each for each in templates.events(image) if each["kind"] == "base"]
    assert bool(messages) == (base.state != "ready")
    for template in (NAME, image):
        sandbox = sandboxes.boot(template=template, size="medium")
        python_works(sandbox)
        javascript_works(sandbox)
    assert sandbox.run_code("import humanize; humanize.intcomma(1000)").text == "'1,000'"
    packaged = "require('/opt/node_modules/left-pad')(1, 3)"
    assert sandbox.run_code(packaged, language="javascript").text == "'  1'"


def python_works(sandbox: Sandbox) -> None:
    [plot] = sandbox.run_code(FIGURE).results
    assert (plot.type, bool(plot.png), bool(plot.chart)) == ("chart", True, True)
    [table] = sandbox.run_code("import pandas; pandas.DataFrame({'a': [1]})").results
    assert "<table" in (table.html or "")


def javascript_works(sandbox: Sandbox) -> None:
    assert sandbox.run_code("const a = await 41", language="javascript").error is None
    ran = sandbox.run_code("console.log('größe'); a + 1", language="js")
    assert (ran.text, ran.stdout, ran.error) == ("42", "größe\n", None)
    failed = sandbox.run_code("function f() { nope() }\nf()", language="node").error
    assert failed is not None
    assert failed.name == "ReferenceError"
    assert any("run-3.js:1" in line for line in failed.traceback)
    late = sandbox.run_code("while (true) {}", language="javascript", timeout_seconds=1)
    assert late.interrupted
    assert sandbox.run_code("a", language="javascript").text == "41"
    used = {each.id: each.language for each in sandbox.code_contexts()}
    assert used["default-javascript"] == "javascript"

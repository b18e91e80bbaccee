"""The rules for templates, on templates that break one each."""

from __future__ import annotations

import pytest

from tests.template_lint import complaints, indent

GOOD = """\
{% load console %}
{% if template.status == "ready" %}
  <p class="help{% if a == "b" %} c{% endif %}"
    id="x">
    It is <b>ready</b>, <code>{{ template.id }}</code> and <small>small</small>.
  </p>
{% else %}
  <pre>
as {% for line in lines %}it{% endfor %}
      is</pre>
{% endif %}
"""


def test_a_template_in_order_has_no_complaints() -> None:
    assert complaints(GOOD) == []


@pytest.mark.parametrize(
    ("was", "becomes", "complaint"),
    [
        ("It is", "It is" + " so" * 30, "5: the line has 170 characters; at most 120"),
        ("    It is", "  It is", "5: indent by 4"),
        ("{% else %}", "  {% else %}", "7: indent by 0"),
        ("</p>\n", "</p><p>\n</p>\n", "6: begin a line with p, which follows p"),
        ("<b>", "<input> <b>", "5: begin a line with b, which follows input"),
        ("<b>ready</b>", "<label>ready</label> <input>", "5: begin a line with input"),
        ("  </p>\n", "", "1: the end of if closes [('p', 2)]"),
        ("{% endif %}\n", "", "1: if is never closed"),
        ('id="x">', 'id="x', "1: the tag <p has no end"),
    ],
)
def test_what_breaks_a_rule_is_named_with_its_line(was: str, becomes: str, complaint: str) -> None:
    wrong = complaints(GOOD.replace(was, becomes, 1))
    assert [one for one in wrong if one.startswith(complaint)], wrong


def test_what_a_pre_holds_is_left_as_it_is() -> None:
    shifted = GOOD.replace("\n  ", "\n")
    assert indent(shifted) == GOOD.replace("\n      is", "\n    is")

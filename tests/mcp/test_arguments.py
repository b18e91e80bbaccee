"""The tools' arguments are the fields of the specs that REST reads."""

from __future__ import annotations

from typing import Annotated, Any

import pytest
from pydantic import BaseModel, Field

from orkestr_console.core.errors import InvalidInput
from orkestr_console.http.validation import parse_spec
from orkestr_console.mcp.arguments import Without, flattened
from orkestr_console.mcp.schema import input_schema
from orkestr_console.mcp.server import TOOLS
from sandboxes_app.specs import BackgroundSpec, ExecSpec, SandboxSpec, SnapshotSpec, TimeoutSpec
from templates_app.specs import TemplateSpec
from tests.fakes.host import FakeHost
from tests.mcp.conftest import Connect
from tests.mcp.test_tools import done, refused

SPECS: dict[str, tuple[type[BaseModel], set[str]]] = {
    "create_template": (TemplateSpec, {"reuse"}),
    "create_sandbox": (
        SandboxSpec,
        {"region"},
    ),
    "exec": (ExecSpec, {"stream"}),
    "exec_background": (BackgroundSpec, set()),
    "set_sandbox_timeout": (TimeoutSpec, set()),
    "snapshot_sandbox": (SnapshotSpec, set()),
}
BOUNDS = [
    ("create_template", TemplateSpec, "disk_mb", 255),
    ("create_template", TemplateSpec, "step_timeout_seconds", 0),
    ("create_sandbox", SandboxSpec, "timeout_seconds", 9),
    ("create_sandbox", SandboxSpec, "metadata", {"": "x"}),
    ("exec", ExecSpec, "timeout_seconds", 3601),
    ("exec", ExecSpec, "cwd", "workspace"),
]
REQUIRED: dict[type[BaseModel], dict[str, Any]] = {
    TemplateSpec: {"name": "tools", "base_template": "debian-12", "recipe": ["true"]},
    SandboxSpec: {"template": "debian-12"},
    ExecSpec: {"command": "true"},
}


@pytest.mark.parametrize("name", SPECS)
def test_a_tool_offers_each_field_as_the_spec_describes_it(name: str) -> None:
    [tool] = [one for one in TOOLS if one.name == name]
    spec, omitted = SPECS[name]
    schema = input_schema(spec.model_json_schema())
    arguments = tool.parameters["properties"]
    # What a tool says in its own words.
    own = {"description", *({"default"} if name == "exec" else ())}
    for field, described in schema["properties"].items():
        if field in omitted:
            assert field not in arguments
        else:
            for word in (arguments[field].keys() | described.keys()) - own:
                assert arguments[field][word] == described[word]
            assert (field in tool.parameters.get("required", ())) == (
                field in schema.get("required", ())
            )


@pytest.mark.parametrize(("tool", "spec", "field", "value"), BOUNDS)
@pytest.mark.django_db(transaction=True)
async def test_a_bound_is_refused_in_the_words_of_rest(
    connect: Connect,
    key: str,
    host: FakeHost,
    tool: str,
    spec: type[BaseModel],
    field: str,
    value: Any,
) -> None:
    given = {**REQUIRED[spec], field: value}
    with pytest.raises(InvalidInput) as error:
        parse_spec(spec, given)
    box = {"sandbox_id": "sbx_x"} if spec is ExecSpec else {}
    async with connect(key) as client:
        assert await refused(client, tool, **box, **given) == f"invalid_request: {error.value}"


@pytest.mark.django_db(transaction=True)
async def test_null_stands_for_an_argument_that_is_left_out(
    connect: Connect, key: str, host: FakeHost
) -> None:
    async with connect(key) as client:
        source = await done(client, "create_sandbox", template="debian-12", network="restricted")
        snapshot = await done(client, "snapshot_sandbox", sandbox_id=source["id"], name=None)
        blank = dict.fromkeys(("template", "size", "network", "env", "metadata"))
        box = await done(client, "create_sandbox", snapshot=snapshot["id"], **blank)
        # The snapshot's, as it is where nobody names a network.
        assert box["network"] == "restricted"
        said = await refused(client, "exec", sandbox_id=box["id"], command=None)
    assert said == "invalid_request: command: must be a string."


def test_a_spec_gets_what_was_provided_converted() -> None:
    class Spec(BaseModel, strict=True):
        count: int = Field(default=1, le=5)
        other: int = 2
        hidden: bool = False

    class Declared(BaseModel):
        sandbox_id: str
        spec: Annotated[Spec, Without("hidden")]

    model = flattened(Declared)
    assert set(model.model_fields) == {"sandbox_id", "count", "other"}
    values = model.model_validate({"sandbox_id": "x", "count": "5"}).model_dump_one_level()
    assert values == {"sandbox_id": "x", "spec": Spec(count=5)}
    assert values["spec"].model_fields_set == {"count"}

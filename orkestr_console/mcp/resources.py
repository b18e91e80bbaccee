"""What agents may read beside the tools, and the prompt to begin with."""

from __future__ import annotations

import json
from typing import Annotated

from mcp.server.mcpserver import MCPServer
from mcp.server.mcpserver.exceptions import ResourceError, ResourceNotFoundError
from pydantic import Field

from orkestr_console.core.errors import DomainError, NotFound, to_mcp_text
from orkestr_console.mcp.template_tools import log_part
from orkestr_console.mcp.tool import MOST_CHARACTERS, Ctx, actor_of, ask
from templates_app import services
from templates_app.models import Template

FOR_REPOSITORY = """\
Build a sandbox template for the repository at {repository}.

1. Read what the repository says of its dependencies (README, pyproject.toml, requirements files, \
package.json, Dockerfile, CI configuration) and find the language and its version.
2. Call list_base_templates and choose the base that has the most of it already.
3. Write a recipe of few shell steps: system packages first, then the language's, with versions \
pinned. Each step is a shell of its own, runs as root with HOME=/root, and only what is outside \
/workspace and /tmp is kept. Do not copy the repository's own code in, and no secrets.
4. Call create_template, then wait_for_template until the status is ready or failed.
5. If it failed, read error_message and log_tail, mend the step that failed, and create it again \
with reuse_failed=true. If hosts were refused, name them in allow_domains beside "@default".
6. Try it: create_sandbox from the template's id, exec what shows that the dependencies are there, \
terminate_sandbox. Then say the template's id.
"""


def add_resources(server: MCPServer) -> None:
    """A template's recipe and its build log."""

    @server.resource(
        "orkestr://templates/{template_id}/recipe",
        title="A template's recipe",
        mime_type="application/json",
    )
    async def recipe(template_id: str, ctx: Ctx) -> str:
        """What a template is built from: base, steps, network."""
        template = await found(template_id, ctx)
        fields = ("name", "base_template", "recipe", "network", "allow_domains")
        return json.dumps({name: getattr(template, name) for name in fields}, indent=2)

    @server.resource(
        "orkestr://templates/{template_id}/log",
        title="A template's build log",
        mime_type="text/plain",
    )
    async def log(template_id: str, ctx: Ctx) -> str:
        """The beginning of a build's log; the tool get_template_log has the rest."""
        part = await log_part(await found(template_id, ctx), 0, MOST_CHARACTERS)
        if part.next_offset is None:
            return part.text
        return f"{part.text}\n[… go on with get_template_log, offset={part.next_offset} …]\n"


async def found(template_id: str, ctx: Ctx) -> Template:
    """A template that the caller may read. Raises the SDK's errors."""
    try:
        return await ask(services.get_template, actor_of(ctx), template_id)
    except NotFound as error:
        raise ResourceNotFoundError(to_mcp_text(error)) from None
    except DomainError as error:
        raise ResourceError(to_mcp_text(error)) from None


def add_prompts(server: MCPServer) -> None:
    """What to ask of an agent."""

    @server.prompt(title="Build a template for this repository")
    def build_a_template_for_this_repository(
        repository: Annotated[
            str, Field(description="Where it is: a path or an address that you can read.")
        ] = "the current directory",
    ) -> str:
        """Read a repository's dependencies, bake them into a template, and try it."""
        return FOR_REPOSITORY.format(repository=repository)

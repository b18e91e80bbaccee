"""Resources that agents can read, and a prompt to start from."""

from __future__ import annotations

import json
from typing import Annotated

from mcp.server.mcpserver import MCPServer
from mcp.server.mcpserver.exceptions import ResourceError, ResourceNotFoundError
from pydantic import Field

from orkestr_console.core.errors import DomainError, NotFound, to_mcp_text
from orkestr_console.mcp.template_tools import read_log
from orkestr_console.mcp.tool import MAX_CHARACTERS, Ctx, actor_of, call_service
from templates_app import services
from templates_app.models import Template

REPOSITORY_PROMPT = """\
Build a sandbox template for the repository at {repository}.

1. Find the repository's dependencies (README, pyproject.toml, requirements files, package.json, \
Dockerfile, CI configuration), the language and its version.
2. Call list_base_templates and choose the base that already has most of them.
3. Write a recipe of a few shell steps: system packages first, then the language's packages, with \
pinned versions. Each step runs in a new shell as root with HOME=/root. /workspace and /tmp are \
not kept. Don't include the repository's own code or any secrets.
4. Call create_template, then wait_for_template until the status is ready or failed.
5. If it failed, read error_message and log_tail, fix the failed step, and create the template \
again with reuse_failed=true. If hosts were blocked, add them to allow_domains together with \
"@default".
6. Test it: create_sandbox from the template's id, exec a command that uses the dependencies, \
terminate_sandbox. Then report the template's id.
"""


def add_resources(server: MCPServer) -> None:
    """Register a template's recipe and its build log."""

    @server.resource(
        "orkestr://templates/{template_id}/recipe",
        title="A template's recipe",
        mime_type="application/json",
    )
    async def recipe(template_id: str, ctx: Ctx) -> str:
        """What a template is built from: base, steps, network."""
        template = await readable_template(template_id, ctx)
        fields = ("name", "base_template", "recipe", "network", "allow_domains")
        return json.dumps({name: getattr(template, name) for name in fields}, indent=2)

    @server.resource(
        "orkestr://templates/{template_id}/log",
        title="A template's build log",
        mime_type="text/plain",
    )
    async def log(template_id: str, ctx: Ctx) -> str:
        """The start of a build log; the tool get_template_log has the rest."""
        part = await read_log(await readable_template(template_id, ctx), 0, MAX_CHARACTERS)
        if part.next_offset is None:
            return part.text
        return f"{part.text}\n[… continue with get_template_log, offset={part.next_offset} …]\n"


async def readable_template(template_id: str, ctx: Ctx) -> Template:
    """A template that the caller can read. Raises the SDK's errors."""
    try:
        return await call_service(services.get_template, actor_of(ctx), template_id)
    except NotFound as error:
        raise ResourceNotFoundError(to_mcp_text(error)) from None
    except DomainError as error:
        raise ResourceError(to_mcp_text(error)) from None


def add_prompts(server: MCPServer) -> None:
    """Register the prompt."""

    @server.prompt(title="Build a template for this repository")
    def build_a_template_for_this_repository(
        repository: Annotated[
            str, Field(description="A path or URL that you can read.")
        ] = "the current directory",
    ) -> str:
        """Find a repository's dependencies, install them in a template, and test it."""
        return REPOSITORY_PROMPT.format(repository=repository)

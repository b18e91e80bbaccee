"""The agent's health, and the egress proxy's decisions."""

from __future__ import annotations

import asyncio

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from hostruntime.agent.host import Host
from hostruntime.agent.requests import query_parameter
from hostruntime.agent.responses import respond
from hostruntime.network.egress import default_domains
from hostruntime.wire.health import DefaultDomains, EgressHosts


def routes(host: Host) -> list[Route]:
    """The routes, over a host."""

    async def health(_: Request) -> Response:
        return respond(await asyncio.to_thread(host.health))

    async def defaults(_: Request) -> Response:
        return respond(DefaultDomains(await asyncio.to_thread(default_domains, host.paths)))

    async def hosts(request: Request) -> Response:
        result = await asyncio.to_thread(host.proxy.hosts, query_parameter(request, "owner"))
        return respond(EgressHosts(tuple(result)))

    return [
        Route("/health", health),
        Route("/egress/defaults", defaults),
        Route("/egress/hosts", hosts),
    ]

"""The agent's health, and the egress proxy's decisions."""

from __future__ import annotations

import asyncio

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from hostruntime.agent.host import Host
from hostruntime.agent.requests import query_number, query_parameter
from hostruntime.agent.responses import respond
from hostruntime.network.egress import default_domains
from hostruntime.wire.health import DefaultDomains, EgressDecisions, EgressHosts


def routes(host: Host) -> list[Route]:
    """The routes, over a host."""

    async def health(_: Request) -> Response:
        return respond(await asyncio.to_thread(host.health))

    async def defaults(_: Request) -> Response:
        return respond(DefaultDomains(await asyncio.to_thread(default_domains, host.paths)))

    async def decisions(request: Request) -> Response:
        owner, since = query_parameter(request, "owner"), query_number(request, "since", 0.0)
        result = await asyncio.to_thread(host.proxy.decisions, owner, since)
        return respond(EgressDecisions(tuple(result)))

    async def hosts(request: Request) -> Response:
        result = await asyncio.to_thread(host.proxy.hosts, query_parameter(request, "owner"))
        return respond(EgressHosts(tuple(result)))

    return [
        Route("/health", health),
        Route("/egress/defaults", defaults),
        Route("/egress/decisions", decisions),
        Route("/egress/hosts", hosts),
    ]

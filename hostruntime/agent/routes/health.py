"""How the agent is, and what the egress proxy let through and refused."""

from __future__ import annotations

import asyncio

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from hostruntime.agent.host import Host
from hostruntime.agent.requests import parameter
from hostruntime.agent.responses import answer
from hostruntime.network.egress import default_domains
from hostruntime.wire.health import DefaultDomains, EgressHosts


def routes(host: Host) -> list[Route]:
    """The routes, over a host."""

    async def health(_: Request) -> Response:
        return answer(await asyncio.to_thread(host.health))

    async def defaults(_: Request) -> Response:
        return answer(DefaultDomains(await asyncio.to_thread(default_domains, host.paths)))

    async def hosts(request: Request) -> Response:
        found = await asyncio.to_thread(host.proxy.hosts, parameter(request, "owner"))
        return answer(EgressHosts(tuple(found)))

    return [
        Route("/health", health),
        Route("/egress/defaults", defaults),
        Route("/egress/hosts", hosts),
    ]

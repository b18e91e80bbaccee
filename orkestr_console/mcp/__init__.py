"""MCP: what a person can do with templates and sandboxes, as tools for an agent.

``endpoint`` is the ASGI application, ``server`` puts the tools together, ``tool`` says how each is
called and refuses. The tools call the services that REST calls; nothing is decided here.
"""

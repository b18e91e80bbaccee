"""MCP: templates and sandboxes as tools for agents.

``endpoint`` is the ASGI application, ``server`` assembles the tools, ``arguments`` and ``results``
define what they take and return, and ``tool`` calls them and reports errors. The tools call the
same services as REST and make no decisions of their own.
"""

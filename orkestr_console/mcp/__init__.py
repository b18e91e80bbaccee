"""MCP: templates and sandboxes as tools for agents.

``endpoint`` is the ASGI application, ``server`` assembles the tools, ``arguments`` and ``results``
define what they take and return, and ``tool`` calls them and reports errors. ``schema`` and
``lists`` keep definitions and answers small, ``using`` finds a sandbox and says how long it has
left, ``progress`` and ``cancelling`` are for calls that last. The tools call the same services as
REST and make no decisions of their own.
"""

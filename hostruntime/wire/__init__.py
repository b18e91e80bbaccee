"""The messages between the web process and the agent: every request and response, by noun.

====================== ==========================================================================
``message``            their base class, and conversion to and from JSON
``resources``          CPU, memory and disk of a container
``sandboxes``          creating sandboxes, their deadlines, snapshots, changes and usage
``commands``           running commands, and their results
``files``              files in a sandbox
``builds``             builds of templates and their events
``images``             bases and images
``reconciliation``     the state's installation, reconciliation, quarantine
``ports``              connections to ports in a sandbox, over a socket of their own
``health``             the agent's health, and the egress proxy's decisions
====================== ==========================================================================

Each is a frozen dataclass and its only definition: the client accepts and returns it, the agent
validates it (:func:`hostruntime.wire.message.decode`) and passes it on.  The two may have different
versions, so

- each side ignores fields that it does not know, in requests and in responses;
- an added field has a default, which means the behaviour before it and never changes: streams do
  not send fields with their default;
- sets of values that may grow, such as the states of a build, are a ``str`` in a response.

Times named ``…_at``, ``deadline`` are Unix seconds (float), durations ``…_ms`` milliseconds,
``…_seconds`` seconds, sizes ``…_bytes`` bytes and ``…_mb`` MiB.
"""

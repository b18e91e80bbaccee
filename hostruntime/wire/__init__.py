"""What the web and the agent say to each other: every request and every answer, by noun.

====================== ==========================================================================
``message``            the base of them all, and how one becomes JSON and back
``resources``          CPU, memory and disk of a container
``sandboxes``          creating sandboxes, their deadlines, snapshots, changes and usage
``commands``           running commands, and what comes of them
``files``              files in a sandbox
``builds``             builds of templates and their events
``images``             bases and images
``keeping``            whose the state is, reconciliation, quarantine
``health``             how the agent is, and what the egress proxy decided
====================== ==========================================================================

Each is a frozen dataclass and nothing else describes it: the client takes and returns it, the agent
validates it (:func:`hostruntime.wire.message.decode`) and hands it on.  The two may be of different
versions, so

- a field that one side does not know is left out by it, in requests and in answers;
- a field that is added has a default, which stands for what there was before it and never changes:
  in streams what has its default is not sent;
- what may grow, such as the states of a build, is a ``str`` in an answer.

Times named ``…_at``, ``deadline`` are Unix seconds (float), durations ``…_ms`` milliseconds,
``…_seconds`` seconds, sizes ``…_bytes`` bytes and ``…_mb`` MiB.
"""

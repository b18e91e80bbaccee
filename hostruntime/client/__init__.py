"""The client side of the host agent's API (:mod:`hostruntime.wire`)."""

"""How others speak to the host agent, in the words of :mod:`hostruntime.wire`."""

"""How others speak to the host agent, and what it answers."""

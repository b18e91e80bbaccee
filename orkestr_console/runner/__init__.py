"""Installs, starts, watches and stops a whole console on one machine (`make run`)."""

"""Backups of an installation: taken while it runs, verified, and brought back into an empty one."""

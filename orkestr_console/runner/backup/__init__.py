"""Backups of an installation: created while it runs, verified, restored into an empty one."""

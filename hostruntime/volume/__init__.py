"""Volumes: storage that outlives sandboxes, mounted at /persist in one at a time."""

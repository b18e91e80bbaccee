"""Sandboxes: booted from a base or a template, used, and ended."""

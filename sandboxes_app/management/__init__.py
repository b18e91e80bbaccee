"""The management commands of sandboxes."""

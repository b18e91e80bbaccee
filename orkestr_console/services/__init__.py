"""What the apps' services share: the way to the host, and how lists are paged."""

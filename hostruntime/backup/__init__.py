"""Images and snapshots in a backup, and back again."""

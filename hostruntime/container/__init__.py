"""One container: its disk and root, its confinement, and commands and files in it."""

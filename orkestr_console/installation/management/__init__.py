"""Management commands of the installation app."""

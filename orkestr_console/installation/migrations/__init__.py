"""The migrations of the installation app."""

"""The schema of the accounts app."""

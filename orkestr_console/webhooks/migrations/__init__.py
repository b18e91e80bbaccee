"""The migrations of the webhooks app."""

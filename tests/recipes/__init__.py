"""Recipes that people write, each built restricted and used in a sandbox without a network."""

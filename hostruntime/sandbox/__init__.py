"""Containers that people use: their life to a deadline, snapshots, and usage."""

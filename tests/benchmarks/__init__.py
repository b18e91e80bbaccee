"""Measurements, not tests: `python -m tests.benchmarks` prints tables and asserts nothing."""

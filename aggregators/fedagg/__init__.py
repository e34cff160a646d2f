"""Aggregation rules: how updates become the next version."""

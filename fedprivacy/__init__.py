"""Differential privacy: what was released, what that costs, and what a budget allows."""

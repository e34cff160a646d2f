"""The demo task: handwritten digits, seen differently by each client."""

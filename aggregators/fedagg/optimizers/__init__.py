"""Server optimisers: how an aggregate becomes a step of the global vector."""

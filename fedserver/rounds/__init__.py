"""How a job moves: who works (scheduler), what counts (intake), how a version is made (closing)."""

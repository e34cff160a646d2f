"""What a job starts from, if not from what its adapter draws: the values of a PEFT adapter (docs/export.md)."""

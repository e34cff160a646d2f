"""The server daemon: it moves rounds forward and keeps the journal."""

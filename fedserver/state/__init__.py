"""What survives a restart: records in a store, bytes in blobs, both in one locked folder."""

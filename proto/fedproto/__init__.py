"""The wire messages of Roundtable."""

"""The simulator: the server and clients of a job in one process."""

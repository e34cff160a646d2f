"""What both daemons agree on: errors, names, plugins, layout, job file, randomness and clock."""

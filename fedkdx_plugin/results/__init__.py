"""Results of runs on disk, written and read."""

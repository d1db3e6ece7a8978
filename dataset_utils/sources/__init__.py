"""Data sources: one module for each data set, and `own` for the user's own recordings."""

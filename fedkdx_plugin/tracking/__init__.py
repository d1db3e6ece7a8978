"""Callbacks that show the progress of runs or send their metrics elsewhere."""

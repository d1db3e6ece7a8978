"""Runs of several algorithms, seeds and settings: planned, made and resumed."""

"""Differential privacy: what is asked for, what noise that takes, how it is added, and what has been spent."""

"""Audit of runs: attacks on what a run shares and on what stays with its clients, with figures."""

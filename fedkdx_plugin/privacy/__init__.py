"""Privacy: what a server cannot learn, and what can be proved about it."""

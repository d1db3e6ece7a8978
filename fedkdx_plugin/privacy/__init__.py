"""Privacy of federations: what can be proved, and what a run leaks."""

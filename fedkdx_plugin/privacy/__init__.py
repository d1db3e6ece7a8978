"""Privacy of federations: what can be proved, what noise that takes, and what a run leaks (`audit`)."""

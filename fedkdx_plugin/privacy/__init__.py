"""Privacy: what noise and masks a promise takes, what has been spent, what a server cannot learn, what a run leaks."""

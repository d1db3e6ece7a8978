"""Privacy: what is asked for, what noise and masks that takes, what has been spent, and what a server cannot learn."""

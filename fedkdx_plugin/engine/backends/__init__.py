"""Ways to do the clients' work: one by one, in processes, stacked on one device."""

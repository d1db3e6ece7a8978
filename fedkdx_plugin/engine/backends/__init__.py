"""Backends, which do the clients' work: one by one, in processes, or stacked on one device."""

"""Clients trained together on one device: their networks and batches in one set of tensors, one step for all."""

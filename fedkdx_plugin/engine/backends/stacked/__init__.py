"""Backend that trains clients together on one device: networks and batches are stacked, one step trains all."""

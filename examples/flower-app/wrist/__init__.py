"""Somebody's own Flower app: their network, their data, FedKDX between their clients."""

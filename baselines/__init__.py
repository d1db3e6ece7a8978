"""Algorithms that FedKDX is compared with: one file each, with its paper on the first line."""

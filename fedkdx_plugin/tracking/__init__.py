"""Callbacks that show or record runs while they go on."""

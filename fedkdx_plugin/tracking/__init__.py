"""Callbacks that show or record a run while it goes on."""

"""Downlinks, which send the shared student to the clients: one module each, with the server's and the client's end."""

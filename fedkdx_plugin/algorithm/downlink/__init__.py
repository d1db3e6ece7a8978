"""How the shared student gets from the server to the clients: one module a way, both ends of it in each."""

"""The same rounds between real sites: each holds its own shards and private state, and messages cross the network."""

"""The engine: round loop, client sampling, local training, backends, transport, evaluation."""

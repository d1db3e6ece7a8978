"""Operations of a training step on a CPU, compiled from C on first use.

Each replaces operations of PyTorch, and is used only after a check that it agrees with them (`twin`).
"""

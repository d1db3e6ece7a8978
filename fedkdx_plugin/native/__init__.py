"""Operations of a training step on a CPU, compiled from C on first use.

Each stands for PyTorch's operations, and is used only where it has been found to agree with them (`twin`).
"""

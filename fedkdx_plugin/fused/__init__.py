"""Operations of a training step on a CPU, compiled from C on first use.

Each agrees with PyTorch's to float tolerance.
"""

"""Estimates of how many clients and windows fit into memory at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fedkdx_plugin.engine.data import DeviceData
from fedkdx_plugin.engine.training import Settings
from registry.interface import Model, float_state

BATCH_NORM = nn.modules.batchnorm._BatchNorm
CPU_MEMORY = 1 << 30  # bytes for a stack on a CPU
GPU_MEMORY = 8 << 30  # bytes on a GPU, at most half of its memory: more clients at once are not faster
STATES = 8  # copies of a client's state in training: working state, step, gradients, updates, and spares
WINDOWS = 4  # windows of a trial batch: batch norm needs more than one


class Probe(NamedTuple):
    """Cost of a window.

    Attributes:
        bytes_a_window: memory in a training step: what is kept for the backward pass, and as much again for that pass.
        least_values: fewest values per channel that a window gives a batch-norm layer in training; one row with one
            value has no variance. Large if there is no such layer.
    """

    bytes_a_window: int
    least_values: int


class Most(NamedTuple):
    """Largest number of steps of a round, and of windows of several clients together."""

    steps: int
    windows: int


def probe(nets: Mapping[str, nn.Module]) -> Probe:
    """Measure the cost of a window by a training pass of each model."""
    own = {tensor.untyped_storage().data_ptr() for net in nets.values() for tensor in net.state_dict().values()}
    kept: dict[int, int] = {}
    values = [1 << 30]
    for net in nets.values():
        if not isinstance(net, Model) and any(isinstance(part, BATCH_NORM) and part.training for part in net.modules()):
            values.append(1)  # the input of such a network is not known

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    def look(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if module.training or module.running_mean is None:
            values.append(inputs[0][:, 0].numel() // WINDOWS)

    for net in (net for net in nets.values() if isinstance(net, Model)):
        norms = [part for part in net.modules() if isinstance(part, BATCH_NORM)]
        hooks = [part.register_forward_pre_hook(look) for part in norms]
        x = next(iter(float_state({"": net}).values())).new_zeros(WINDOWS, *net.shape)
        statistics = {name: tensor.clone() for name, tensor in net.named_buffers()}
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            net.train()(x)
        for name, tensor in net.named_buffers():
            tensor.copy_(statistics[name])
        for hook in hooks:
            hook.remove()
    return Probe(max(1, 2 * sum(kept.values()) // WINDOWS), min(values))


def budget(device: torch.device) -> int:
    """Return the bytes that a stack may take: the same in every run, so that the same clients are stacked."""
    if device.type != "cuda":
        return CPU_MEMORY
    return min(torch.cuda.get_device_properties(device).total_memory // 2, GPU_MEMORY)


def clients_at_once(memory: int, probe: Probe, initial: Mapping[str, Tensor], batch_size: int) -> int:
    """Return how many clients' training steps fit into memory, at least 1."""
    state = sum(tensor.numel() * tensor.element_size() for tensor in initial.values())
    return max(1, memory // (batch_size * probe.bytes_a_window + STATES * state))


def most(data: DeviceData, settings: Settings, clients: int, repeats: int) -> Most:
    """Return the sizes of static tensors that suffice for any set of so many clients, with `repeats` steps a batch."""
    counts = sorted((len(y) for y in data.train_y), reverse=True)
    return Most(settings.local_epochs * -(-counts[0] // settings.batch_size) * repeats, sum(counts[:clients]))

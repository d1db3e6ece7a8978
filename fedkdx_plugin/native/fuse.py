"""Search for chains of layers in networks: whole models, their features, or sequences."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import NoneType

from torch import nn
from torch.nn.modules.utils import _pair

from fedkdx_plugin.native import library
from fedkdx_plugin.native.chain import CONVOLUTION_BLOCK, DENSE, DENSE_RELU, FLATTEN, VECTOR, Chain, Layer, Plan
from registry.interface import Model

MOST = 32  # layers of a chain, as in chain.c


def fuse(nets: Mapping[str, nn.Module]) -> None:
    """Replace methods of models and sequences by `Chain`s; parameters, buffers and names stay."""
    if library.operations() is not None:
        for net in nets.values():
            _fuse(net)


def _fuse(module: nn.Module) -> None:
    if _of_sequence(module):
        module.forward = Chain(module, "forward", _of_sequence)
    elif isinstance(module, Model) and _of_features(module):
        # of this very module: its class stays as it is
        module.features = Chain(module, "features", _of_features)  # type: ignore[method-assign]
        if _of_model(module):
            module.forward = Chain(module, "forward", _of_model)  # type: ignore[method-assign]
    else:
        for child in module.children():
            _fuse(child)


def _of_sequence(module: nn.Module) -> Plan | None:
    return _plan(module) if type(module) is nn.Sequential else None


def _of_features(module: nn.Module) -> Plan | None:
    return _plan(*module.sequence()) if isinstance(module, Model) and _is_plain(module) else None


def _of_model(model: nn.Module) -> Plan | None:
    """Return the plan of features and head, if the features are the result of a layer."""
    if not isinstance(model, Model):
        return None
    if (features := _of_features(model)) and (whole := _plan(*model.sequence(), model.head)):
        inner = len(features.layers) - 1
        return whole._replace(inner=inner) if whole.layers[inner] == features.layers[inner] else None
    return None


def _is_plain(model: Model) -> bool:
    """Return whether the features are computed by the parts alone."""
    plain = type(model).features is Model.features and type(model).forward is Model.forward
    return plain and model.parts != () and isinstance(vars(model).get("features"), (Chain, NoneType))


def _plan(*modules: nn.Module) -> Plan | None:
    layers = _chain(_flattened(modules)) if not any(map(_has_its_own_way, modules)) else []
    return Plan(layers) if layers else None


def _has_its_own_way(module: nn.Module) -> bool:
    """Return whether this module, or one within, has a `forward` other than its class's."""
    return any(not isinstance(vars(part).get("forward"), (Chain, NoneType)) for part in module.modules())


def _flattened(sequence: Iterable[nn.Module]) -> list[nn.Module]:
    """Return all modules in the order of calls."""
    parts: list[nn.Module] = []
    for part in sequence:
        parts += _flattened(part) if type(part) is nn.Sequential else [part]
    return parts


def _chain(modules: Sequence[nn.Module]) -> list[Layer]:
    """Return the layers; none if some module cannot be part of a chain."""
    layers: list[Layer] = []
    rest = list(modules)
    while rest:
        layer, used = _first(rest, layers)
        if layer is None:
            return []
        layers.append(layer)
        rest = rest[used:]
    return layers if len(layers) <= MOST and _in_order(layers) and all(map(_is_whole, layers)) else []


def _first(modules: Sequence[nn.Module], before: Sequence[Layer]) -> tuple[Layer | None, int]:
    """Return the layer that the first modules form, and their number."""
    first = modules[0]
    if (block := _block(modules[:4])) is not None:
        return block, 4
    if type(first) is nn.Flatten and (first.start_dim, first.end_dim) == (1, -1) and before:
        return Layer(FLATTEN, before[-1].outputs, 0), 1
    if type(first) is nn.Linear and first.bias is not None and first.in_features % VECTOR == 0:
        relu = [type(module) for module in modules[1:2]] == [nn.ReLU]
        return Layer(DENSE_RELU if relu else DENSE, first.in_features, first.out_features, main=first), 1 + relu
    return None, 0


def _block(modules: Sequence[nn.Module]) -> Layer | None:
    """Return the four modules of a convolution block as one layer; None if they are not such a block."""
    if [type(module) for module in modules] != [nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.MaxPool2d]:
        return None
    convolution, norm, _, pool = modules
    assert isinstance(convolution, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d) and isinstance(pool, nn.MaxPool2d)
    if not _is_block(convolution, norm, pool):
        return None
    sizes = convolution.in_channels, convolution.out_channels, convolution.kernel_size[1]
    return Layer(CONVOLUTION_BLOCK, *sizes, convolution, norm)


def _is_whole(layer: Layer) -> bool:
    """Return whether a layer owns its tensors; `weight_norm` and the like compute them from others."""
    return all(held.get(name) is not None for held, name in (*layer.parameters(), *layer.statistics()))


def _in_order(layers: Sequence[Layer]) -> bool:
    """Return whether blocks come first, then at most one flattening, then dense layers."""
    kinds = [min(layer.kind, DENSE) for layer in layers]
    flattenings = kinds.count(FLATTEN)
    return kinds == sorted(kinds) and flattenings <= 1 and (flattenings == 1 or len(set(kinds)) == 1)


def _is_block(convolution: nn.Conv2d, norm: nn.BatchNorm2d, pool: nn.MaxPool2d) -> bool:
    """Return whether the convolution is valid, 1×k, of stride 1, batch norm keeps statistics, and pooling is 1×2."""
    one, none = (1, 1), (0, 0)
    plain = convolution.stride == convolution.dilation == one and convolution.padding == none
    plain = plain and convolution.groups == convolution.kernel_size[0] == 1 and convolution.bias is not None
    keeps = norm.affine and norm.track_running_stats and norm.momentum is not None
    halves = _pair(pool.kernel_size) == _pair(pool.stride) == (1, 2) and _pair(pool.padding) == none
    halves = halves and _pair(pool.dilation) == one and not (pool.ceil_mode or pool.return_indices)
    return bool(plain and keeps and halves and convolution.out_channels % VECTOR == 0)

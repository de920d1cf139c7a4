"""SmoothQuant's balancing (arXiv:2211.10438): large activation channels are divided, their weights multiplied.

The division is migrated into the affine parameters of the norm that makes the activation, so the graph does not grow.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from latentedge.calibration.graph import Layer, constant, is_constant, new_initializer
from latentedge.runtime.bundle import Array

#: Channel factors stay within this, so that no channel vanishes.
LARGEST_FACTOR = 1e3


@dataclass(frozen=True)
class Affine:
    """The norm's parameters that scale and shift an activation: (node, input) pairs, features along ``axis``."""

    parameters: tuple[tuple[ir.Node, int], ...]


def affine_of(value: ir.Value, layers: list[Layer]) -> Affine | None:
    """Where the channels of ``value`` can be divided, or ``None``.

    ``layers`` are the layers that read ``value``; nothing else may read it. The norm is a LayerNormalization, or a
    multiplication and an addition of constants as exporters write GroupNorm's affine part.
    """
    uses = list(value.uses())
    readers = {layer.node for layer in layers}
    if value.is_graph_output() or any(use.idx != 0 or use.node.name not in readers for use in uses):
        return None
    if any(layer.group != 1 for layer in layers):
        return None
    width = layers[0].inputs
    node = value.producer()
    if node is not None and node.op_type == "Cast" and len(node.inputs[0].uses() if node.inputs[0] else ()) == 1:
        node = node.inputs[0].producer() if node.inputs[0] is not None else None
    if node is None:
        return None
    if node.op_type == "LayerNormalization":
        pairs = tuple((node, index) for index in (1, 2) if index < len(node.inputs) and node.inputs[index] is not None)
        return Affine(pairs) if all(_width(owner, index) == width for owner, index in pairs) else None
    return _decomposed(node, width)


def _decomposed(node: ir.Node, width: int) -> Affine | None:
    """``Add(Mul(x, weight), bias)`` with constants of one value for each feature."""
    if node.op_type != "Add":
        return None
    shift = _constant_side(node)
    if shift is None or _width(node, shift) != width:
        return None
    scaled = node.inputs[1 - shift]
    product = None if scaled is None else scaled.producer()
    if product is None or product.op_type != "Mul" or len(list(product.outputs[0].uses())) != 1:
        return None
    factor = _constant_side(product)
    if factor is None or _width(product, factor) != width:
        return None
    return Affine(((product, factor), (node, shift)))


def _constant_side(node: ir.Node) -> int | None:
    sides = [index for index, value in enumerate(node.inputs) if is_constant(value)]
    return sides[0] if len(sides) == 1 else None


def _width(node: ir.Node, index: int) -> int:
    array = constant(node.inputs[index])
    return 0 if array is None else array.size


def factors(channel_amax: Array, weight_amax: Array, exponent: float) -> Array:
    """What each channel of the activation is divided by, float32 [C]: ``amax^exponent / weight^(1 - exponent)``.

    A channel that is zero, in the activation or in the weights, keeps the factor 1.
    """
    usable = (channel_amax > 0) & (weight_amax > 0) & np.isfinite(channel_amax)
    activation = np.where(usable, channel_amax, 1).astype(np.float64)
    weight = np.where(usable, weight_amax, 1).astype(np.float64)
    wanted = activation**exponent / weight ** (1 - exponent)
    middle = np.exp(np.mean(np.log(wanted[usable]))) if usable.any() else 1.0
    limited = np.clip(wanted / middle, 1 / LARGEST_FACTOR, LARGEST_FACTOR)
    return np.where(usable, limited, 1.0).astype(np.float32)


def weight_amax(weights: list[tuple[Array, int]]) -> Array:
    """Largest weight of each input channel over several layers, given as (weight, input axis)."""
    largest = [
        np.abs(np.moveaxis(weight, axis, 0).reshape(weight.shape[axis], -1)).max(axis=1) for weight, axis in weights
    ]
    return np.asarray(np.max(largest, axis=0))


def divide(graph: ir.Graph, affine: Affine, factor: Array) -> None:
    """Divide the norm's parameters; shared constants are copied, so other norms keep theirs."""
    for node, index in affine.parameters:
        value = node.inputs[index]
        array = constant(value)
        assert array is not None
        assert value is not None
        divided = (array / factor.reshape(array.shape)).astype(array.dtype)
        node.replace_input_with(index, new_initializer(graph, f"{value.name}_smoothed_{node.name}", divided))


def multiplied(weight: Array, input_axis: int, factor: Array) -> Array:
    """The weight that undoes the division."""
    shape = [1] * weight.ndim
    shape[input_axis] = -1
    return np.asarray(weight * factor.reshape(shape), dtype=weight.dtype)

"""Convolutions after a doubling of both sides, computed before it.

A U-Net and a decoder double a picture by repeating each pixel and then convolve it with a 3x3 kernel. Each of the four
pixels that come from one then sees only four different values, some of them several times: with the kernel's entries
summed accordingly, four 2x2 convolutions of the small picture give the four pixels. That is 16 products for each small
pixel in place of 36, and the doubled picture is never written. In exact arithmetic the result is the same; in float32
the sums are rounded in another order (Shi et al., arXiv 1609.07009, describe the identity).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from latentedge.runtime.bundle import Array

#: Rows (or columns) of a 3x3 kernel that fall on the same small pixel, for the even and the odd rows of the result.
SUMMED = (((0,), (1, 2)), ((0, 1), (2,)))

#: Ways to write "repeat each pixel twice" in ONNX: where a coordinate lies, and how it is rounded.
REPEATING = {
    ("asymmetric", "floor"),
    ("half_pixel", "round_prefer_floor"),
    ("half_pixel", "round_prefer_ceil"),
}


def convolve_before_doubling(model: ir.Model) -> int:
    """Rewrite every doubling that feeds one 3x3 convolution, in place; gives their number."""
    found = [(node, reader) for node in model.graph if (reader := _reader(node)) is not None]
    for resize, convolution in found:
        _rewrite(model.graph, resize, convolution)
    return len(found)


def kernel(weight: Array, row: int, column: int) -> Array:
    """The 2x2 kernel [O, C, 2, 2] of the pixels at an even (0) or odd (1) row and column, of ``weight`` [O, C, 3, 3]."""
    rows = [weight[:, :, list(part)].sum(axis=2) for part in SUMMED[row]]
    sides = [[line[:, :, list(part)].sum(axis=2) for part in SUMMED[column]] for line in rows]
    return np.stack([np.stack(line, axis=2) for line in sides], axis=2)


def _reader(node: ir.Node) -> ir.Node | None:
    """The convolution that alone reads ``node``, where ``node`` is a doubling and both can be rewritten."""
    if node.op_type != "Resize" or node.domain != "" or not _doubles(node) or node.outputs[0].is_graph_output():
        return None
    readers = [use.node for use in node.outputs[0].uses()]
    return readers[0] if len(readers) == 1 and _is_plain_3x3(readers[0]) else None


def _doubles(node: ir.Node) -> bool:
    values = [value for value in node.inputs if value is not None]
    scales = values[1].const_value if len(values) == 2 else None
    attributes = node.attributes
    rounding = (
        attributes.get_string("coordinate_transformation_mode", "half_pixel"),
        attributes.get_string("nearest_mode", "round_prefer_floor"),
    )
    return (
        attributes.get_string("mode", "nearest") == "nearest"
        and rounding in REPEATING
        and attributes.get_ints("axes") is None
        and len(node.inputs) == 3
        and scales is not None
        and np.array_equal(scales.numpy(), [1, 1, 2, 2])
    )


def _is_plain_3x3(node: ir.Node) -> bool:
    weight = node.inputs[1] if node.op_type == "Conv" and node.domain == "" else None
    if weight is None or weight.const_value is None or tuple(weight.const_value.shape)[2:] != (3, 3):
        return False
    attributes = node.attributes
    return (
        attributes.get_int("group", 1) == 1
        and attributes.get_string("auto_pad", "NOTSET") == "NOTSET"
        and tuple(attributes.get_ints("pads", (0, 0, 0, 0))) == (1, 1, 1, 1)
        and tuple(attributes.get_ints("strides", (1, 1))) == (1, 1)
        and tuple(attributes.get_ints("dilations", (1, 1))) == (1, 1)
    )


def _rewrite(graph: ir.Graph, resize: ir.Node, convolution: ir.Node) -> None:
    source, resize_scales, weight = resize.inputs[0], resize.inputs[2], convolution.inputs[1]
    assert source is not None
    assert resize_scales is not None
    assert weight is not None
    assert weight.const_value is not None
    array = weight.const_value.numpy()
    quarters = [
        _quarter(graph, source, convolution, kernel(array, row, column), row, column)
        for row, column in itertools.product((0, 1), repeat=2)
    ]
    joined = _named("Concat", [node.outputs[0] for node in quarters], f"{convolution.name}_phases", {"axis": 1})
    spread = _named(
        "DepthToSpace", [joined.outputs[0]], f"{convolution.name}_interleaved", {"blocksize": 2, "mode": "DCR"}
    )
    result = convolution.outputs[0]
    interleaved = spread.outputs[0]
    interleaved.shape, interleaved.type = result.shape, result.type
    graph.insert_before(convolution, [*quarters, joined, spread])
    ir.convenience.replace_all_uses_with(result, interleaved, replace_graph_outputs=True)
    name = result.name
    graph.remove([convolution, resize], safe=True)
    interleaved.name = name
    for value in (weight, resize_scales):
        if not value.uses():
            graph.initializers.pop(str(value.name), None)


def _quarter(graph: ir.Graph, source: ir.Value, like: ir.Node, weight: Array, row: int, column: int) -> ir.Node:
    """The convolution that makes one of four pixels; one row (column) of padding on the side that its kernel reaches."""
    original = like.inputs[1]
    assert original is not None
    name = f"{original.name}_{row}{column}"
    value = ir.Value(name=name, const_value=ir.tensor(weight, name=name))
    graph.register_initializer(value)
    attributes = {"kernel_shape": [2, 2], "pads": [1 - row, 1 - column, row, column]}
    node = _named("Conv", [source, value, *like.inputs[2:]], f"{like.name}_{row}{column}", attributes)
    node.outputs[0].type = like.outputs[0].type
    return node


def _named(kind: str, inputs: list[ir.Value | None], name: str, attributes: Mapping[str, Any]) -> ir.Node:
    node = ir.node(kind, inputs, attributes, name=name)
    node.outputs[0].name = f"{name}_output_0"
    return node

"""Graphs of a few nodes and bundles around them, written without torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from latentedge.runtime.bundle import Axis, Bundle, Component, Latent, TensorSpec
from tests import tiny_bundles

AXES = {"batch": Axis(1, 2, 8), "latent_height": Axis(2, 4, 16), "latent_width": Axis(2, 4, 16)}


def shape_of(channels: int) -> tuple[int | str, ...]:
    return ("batch", channels, "latent_height", "latent_width")


def graph(operator: str = "Sigmoid", dtype: type = np.float32, layers: int = 2, channels: int = 8) -> Any:
    """``layers`` convolutions with an operator between, in ``dtype``, with float32 input and output."""
    generator = np.random.default_rng(0)
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    nodes, weights, value = [helper.make_node("Cast", ["sample"], ["x"], "in/Cast", to=kind)], [], "x"
    for layer in range(layers):
        weight = generator.standard_normal((channels, channels, 3, 3)).astype(dtype)
        weights.append(numpy_helper.from_array(weight, f"blocks.{layer}.conv.weight"))
        conv, out = f"blocks.{layer}.conv", f"blocks.{layer}.out"
        nodes.append(helper.make_node("Conv", [value, f"{conv}.weight"], [conv], f"{conv}/Conv", pads=[1, 1, 1, 1]))
        nodes.append(helper.make_node(operator, [conv], [out], f"blocks.{layer}.act/{operator}"))
        value = out
    nodes.append(helper.make_node("Cast", [value], ["out_sample"], "out/Cast", to=TensorProto.FLOAT))
    shape = shape_of(channels)
    sample = helper.make_tensor_value_info("sample", TensorProto.FLOAT, shape)
    output = helper.make_tensor_value_info("out_sample", TensorProto.FLOAT, shape)
    model = helper.make_graph(nodes, "tiny", [sample], [output], weights)
    return helper.make_model(model, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def write_bundle(folder: Path, **graphs: Any) -> Bundle:
    variants = {
        precision: tiny_bundles.write_graph(folder, f"unet/model.{precision}.onnx", model.SerializeToString())
        for precision, model in graphs.items()
    }
    channels = next(iter(graphs.values())).graph.initializer[0].dims[0]
    tensors = [TensorSpec(name, "float32", shape_of(channels)) for name in ("sample", "out_sample")]
    unet = Component("unet", (tensors[0],), (tensors[1],), AXES, variants)
    return tiny_bundles.write_bundle(folder, unet, latent=Latent(8, 8))

"""A bundle of two real graphs, ``y = x @ w``, for what needs an engine library and not a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper

from latentedge.runtime.bundle import Axis, Bundle, Component, TensorSpec
from tests import tiny_bundles

X = TensorSpec("x", "float32", ("batch", 4))
Y = TensorSpec("y", "float32", ("batch", 3))
AXES = {"batch": Axis(1, 2, 8)}


def weight(seed: int) -> Any:
    return np.random.default_rng(seed).standard_normal((4, 3)).astype(np.float32)


def graph(seed: int) -> bytes:
    values = [helper.make_tensor_value_info(spec.name, 1, spec.shape) for spec in (X, Y)]
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    made = helper.make_graph(nodes, "matmul", values[:1], values[1:], [onnx.numpy_helper.from_array(weight(seed), "w")])
    content: bytes = helper.make_model(
        made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10
    ).SerializeToString()
    return content


def write_bundle(folder: Path, parity: dict[str, Any] | None = None, **changes: Any) -> Bundle:
    """Components ``unet`` and ``vae_decoder``; ``parity`` is the first one's."""
    components = []
    for seed, name in enumerate(("unet", "vae_decoder")):
        variant = tiny_bundles.write_graph(folder, f"{name}/model.onnx", graph(seed))
        recorded = {} if seed or parity is None else parity
        components.append(Component(name, (X,), (Y,), AXES, {"fp32": variant}, recorded))
    return tiny_bundles.write_bundle(folder, *components, **changes)

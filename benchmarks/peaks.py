"""What this machine reaches at best: matrix products with an engine library, and copies of memory."""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from latentedge.runtime.bundle import (
    Axis,
    Bundle,
    Component,
    Conditioning,
    Defaults,
    Latent,
    Manifest,
    Source,
    TensorSpec,
    Variant,
    graph_precision,
)
from latentedge.runtime.engines import EngineOptions, open_engine
from latentedge.runtime.machine import usable_cores

#: Side of the square product, and how many are chained so that a call's own cost does not count.
SIDE, CHAINED = 1024, 4
COPY_BYTES = 1 << 28
ROUNDS = 7


def gemm_peak(backend: str, precision: str, options: EngineOptions | None = None) -> float:
    """Operations a second of a chain of square matrix products with ``backend`` in ``precision``, the best of rounds."""
    with tempfile.TemporaryDirectory() as folder:
        bundle = _product_bundle(Path(folder), graph_precision(precision))
        with open_engine(bundle, "product", backend, precision, options or EngineOptions()) as engine:
            engine.bind(rows=SIDE)
            engine.write("x", np.random.default_rng(0).standard_normal((SIDE, SIDE)).astype(np.float32))
            engine.run()
            return 2.0 * CHAINED * SIDE**3 / _best(engine.run)


def copy_peak(threads: int | None = None) -> float:
    """Bytes a second, read and written together, that copying a large array moves with ``threads`` threads."""
    count = threads or usable_cores()
    source = np.ones((count, COPY_BYTES // 8 // count), np.float64)
    target = np.empty_like(source)
    with ThreadPoolExecutor(count) as pool:

        def copy() -> None:
            list(pool.map(np.copyto, target, source))

        copy()
        return 2.0 * source.nbytes / _best(copy)


def _best(run: Callable[[], object]) -> float:
    seconds = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def _product_bundle(folder: Path, precision: str) -> Bundle:
    path = folder / "product.onnx"
    onnx.save(_product_graph(precision), str(path))
    variant = Variant(path.name, hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_size)
    side = ("rows", SIDE)
    component = Component(
        "product",
        (TensorSpec("x", "float32", side),),
        (TensorSpec("y", "float32", side),),
        {"rows": Axis(1, SIDE, SIDE)},
        {precision: variant},
    )
    manifest = Manifest(
        "benchmark", "product", Source("none", {}), {}, Latent(1, 1), Conditioning(), {}, Defaults(1, 1),
        {"product": component},
    )  # fmt: skip
    return Bundle(folder, manifest)


def _product_graph(precision: str) -> onnx.ModelProto:
    """``y = x @ w @ w ...``; in int8 every product has quantised inputs (per tensor) and weights (per column)."""
    generator = np.random.default_rng(1)
    nodes: list[onnx.NodeProto] = []
    tensors: list[TensorProto] = []
    name = "x"
    if precision == "fp16":
        nodes.append(helper.make_node("Cast", ["x"], ["x_half"], to=TensorProto.FLOAT16))
        name = "x_half"
    for index in range(CHAINED):
        weight = (generator.standard_normal((SIDE, SIDE)) / np.sqrt(SIDE)).astype(np.float32)
        output = f"product_{index}"
        if precision == "int8":
            _quantised_product(nodes, tensors, name, output, weight, index)
        else:
            kept = weight.astype(np.float16) if precision == "fp16" else weight
            tensors.append(numpy_helper.from_array(kept, f"w_{index}"))
            nodes.append(helper.make_node("MatMul", [name, f"w_{index}"], [output]))
        name = output
    nodes.append(helper.make_node("Cast", [name], ["y"], to=TensorProto.FLOAT))
    values = [helper.make_tensor_value_info(value, TensorProto.FLOAT, ["rows", SIDE]) for value in ("x", "y")]
    graph = helper.make_graph(nodes, "product", values[:1], values[1:], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def _quantised_product(
    nodes: list[onnx.NodeProto],
    tensors: list[TensorProto],
    source: str,
    output: str,
    weight: np.ndarray[tuple[int, int], np.dtype[np.float32]],
    index: int,
) -> None:
    scales = (np.abs(weight).max(axis=0) / 127).astype(np.float32)
    constants = {
        f"w_{index}": np.clip(np.rint(weight / scales), -127, 127).astype(np.int8),
        f"w_scale_{index}": scales,
        f"w_zero_{index}": np.zeros(SIDE, np.int8),
        f"x_scale_{index}": np.float32(4 / 127),
        f"x_zero_{index}": np.int8(0),
    }
    tensors += [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()]
    scale = [f"x_scale_{index}", f"x_zero_{index}"]
    nodes += [
        helper.make_node("QuantizeLinear", [source, *scale], [f"q_{index}"]),
        helper.make_node("DequantizeLinear", [f"q_{index}", *scale], [f"dq_{index}"]),
        helper.make_node("DequantizeLinear", [f"w_{index}", f"w_scale_{index}", f"w_zero_{index}"], [f"dw_{index}"], axis=1),
        helper.make_node("MatMul", [f"dq_{index}", f"dw_{index}"], [output]),
    ]  # fmt: skip

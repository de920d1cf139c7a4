"""What convolving before doubling gives: one pair of Resize and Conv as it is translated, and as it is exported.

    python -m latentedge.benchmarks.doubling

Sizes are those of Stable Diffusion 1.5's denoiser and decoder at 256x256. Both graphs run in turns, in one process.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import click
import numpy as np
import onnx_ir as ir
import onnxruntime
import openvino
from onnx import helper, numpy_helper

from latentedge.benchmarks.statistics import compare_rounds
from latentedge.export.passes.upsampling import convolve_before_doubling
from latentedge.runtime.bundle import Array

#: Batch, channels, and side before doubling.
SIZES = ((2, 1280, 8), (2, 640, 16), (1, 512, 32), (1, 512, 64), (1, 256, 128))
PRECISIONS = ("onnxruntime fp32", "openvino f32", "openvino bf16")


def pair(batch: int, channels: int, side: int) -> ir.Model:
    """A doubling, a 3x3 convolution and a SiLU, as torch's exporter writes them."""
    generator = np.random.default_rng(0)
    weight = generator.standard_normal((channels, channels, 3, 3)) / np.sqrt(9 * channels)
    constants = {
        "scales": np.array([1, 1, 2, 2], np.float32),
        "weight": weight.astype(np.float32),
        "bias": generator.standard_normal(channels).astype(np.float32),
    }
    doubling = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
    nodes = [
        helper.make_node("Resize", ["x", "", "scales"], ["doubled"], name="up/Resize", **doubling),
        helper.make_node("Conv", ["doubled", "weight", "bias"], ["y"], name="up/Conv", pads=[1, 1, 1, 1]),
        helper.make_node("Sigmoid", ["y"], ["gate"]),
        helper.make_node("Mul", ["y", "gate"], ["z"]),
    ]
    shapes = {"x": [batch, channels, side, side], "z": [batch, channels, 2 * side, 2 * side]}
    values = {name: helper.make_tensor_value_info(name, 1, shape) for name, shape in shapes.items()}
    tensors = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = helper.make_graph(nodes, "pair", [values["x"]], [values["z"]], tensors)
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9))


def runner(model: ir.Model, setting: str, image: Array, threads: int) -> Callable[[], Array]:
    """A function that computes the graph for ``image`` once."""
    library, _, precision = setting.partition(" ")
    content = ir.to_proto(model).SerializeToString()
    if library == "onnxruntime":
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, 3
        session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        return lambda: np.asarray(session.run(None, {"x": image})[0])
    properties = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": threads}
    core = openvino.Core()
    request = core.compile_model(core.read_model(content), "CPU", properties).create_infer_request()
    return lambda: np.array(request.infer({"x": image})[0])


def seconds_of(run: Callable[[], Array]) -> float:
    """Processor seconds of one run."""
    start = time.process_time()
    run()
    return time.process_time() - start


@click.command()
@click.option("--threads", default=1, show_default=True)
@click.option("--rounds", default=9, show_default=True)
def main(threads: int, rounds: int) -> None:
    """Time both forms at every size and precision."""
    for batch, channels, side in SIZES:
        image = np.random.default_rng(1).standard_normal((batch, channels, side, side)).astype(np.float32)
        plain, rewritten = pair(batch, channels, side), pair(batch, channels, side)
        convolve_before_doubling(rewritten)
        for setting in PRECISIONS:
            runs = [runner(model, setting, image, threads) for model in (plain, rewritten)]
            error = float(np.abs(runs[0]() - runs[1]()).max())
            times = np.array([[seconds_of(run) for run in runs] for _ in range(rounds)])
            ratio = compare_rounds(times[:, 0].tolist(), times[:, 1].tolist())
            before, after = 1e3 * np.median(times, axis=0)
            click.echo(
                f"{batch}x{channels}x{side}x{side} {setting:17s} {before:7.1f} -> {after:7.1f} ms, "
                f"{ratio.ratio:.2f} times as fast ({ratio.low:.2f}-{ratio.high:.2f}), differs by {error:.1e}"
            )


if __name__ == "__main__":
    main()

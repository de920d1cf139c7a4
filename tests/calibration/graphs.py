"""A small denoiser and decoder as ONNX, made without torch: every kind of layer and every rule occurs once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from latentedge.runtime.bundle import Axis, Bundle, Component, Defaults, Latent, TensorSpec
from tests import tiny_bundles

WIDTH = 32
SIZE = 8


class Builder:
    """Collects nodes and initialisers."""

    def __init__(self, seed: int = 0) -> None:
        self.random = np.random.default_rng(seed)
        self.nodes: list[Any] = []
        self.initializers: list[Any] = []

    def constant(self, name: str, array: Any) -> str:
        self.initializers.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def node(self, kind: str, inputs: list[str], output: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(kind, inputs, [output], name=f"node_{output}", **attributes))
        return output

    def conv(self, name: str, x: str, inputs: int, outputs: int, kernel: int = 3) -> str:
        scale = 1 / np.sqrt(inputs * kernel * kernel)
        weight = self.random.standard_normal((outputs, inputs, kernel, kernel)) * scale
        weight *= np.exp(0.5 * self.random.standard_normal((outputs, 1, 1, 1)))
        w = self.constant(f"{name}.weight", weight.astype(np.float32))
        b = self.constant(f"{name}.bias", self.random.standard_normal(outputs).astype(np.float32) * 0.1)
        return self.node("Conv", [x, w, b], f"{name}_output", pads=[kernel // 2] * 4, kernel_shape=[kernel] * 2)

    def norm_silu(self, name: str, x: str, channels: int) -> str:
        groups = 4
        flat = self.node("Reshape", [x, self.constant(f"{name}.shape", np.array([0, groups, -1]))], f"{name}_flat")
        ones = self.constant(f"{name}.ones", np.ones(groups, np.float32))
        zeros = self.constant(f"{name}.zeros", np.zeros(groups, np.float32))
        normal = self.node("InstanceNormalization", [flat, ones, zeros], f"{name}_normal", epsilon=1e-5)
        back = self.node("Reshape", [normal, self.node("Shape", [x], f"{name}_size")], f"{name}_back")
        weight = np.exp(0.7 * self.random.standard_normal((channels, 1, 1))).astype(np.float32)
        scaled = self.node("Mul", [back, self.constant(f"{name}.weight", weight)], f"{name}_scaled")
        bias = self.random.standard_normal((channels, 1, 1)).astype(np.float32) * 0.2
        shifted = self.node("Add", [scaled, self.constant(f"{name}.bias", bias)], f"{name}_shifted")
        return self.node("Mul", [shifted, self.node("Sigmoid", [shifted], f"{name}_gate")], f"{name}_output")

    def linear(self, name: str, x: str, inputs: int, outputs: int, bias: bool = True) -> str:
        weight = self.random.standard_normal((inputs, outputs)) / np.sqrt(inputs)
        w = self.constant(f"{name}.weight", weight.astype(np.float32))
        y = self.node("MatMul", [x, w], f"{name}_product")
        if not bias:
            return y
        b = self.constant(f"{name}.bias", self.random.standard_normal(outputs).astype(np.float32) * 0.1)
        return self.node("Add", [y, b], f"{name}_output")

    def layer_norm(self, name: str, x: str, channels: int) -> str:
        weight = np.exp(self.random.standard_normal(channels)).astype(np.float32)
        w = self.constant(f"{name}.weight", weight)
        b = self.constant(f"{name}.bias", self.random.standard_normal(channels).astype(np.float32) * 0.2)
        return self.node("LayerNormalization", [x, w, b], f"{name}_output", axis=-1, epsilon=1e-5)


def residual(b: Builder, name: str, x: str, inputs: int, outputs: int, embedding: str) -> str:
    """Two convolutions, the timestep's embedding added between them, and a shortcut where the width changes."""
    hidden = b.conv(f"{name}.conv1", b.norm_silu(f"{name}.norm1", x, inputs), inputs, outputs)
    weight = b.random.standard_normal((WIDTH, outputs)).astype(np.float32) * 0.1
    shift = b.node(
        "Gemm",
        [embedding, b.constant(f"{name}.emb.weight", weight), b.constant(f"{name}.emb.bias", np.zeros(outputs, "f4"))],
        f"{name}.emb_output",
    )
    shift = b.node("Unsqueeze", [shift, b.constant(f"{name}.axes", np.array([2, 3]))], f"{name}.emb_wide")
    hidden = b.node("Add", [hidden, shift], f"{name}.shifted")
    hidden = b.conv(f"{name}.conv2", b.norm_silu(f"{name}.norm2", hidden, outputs), outputs, outputs)
    around = x if inputs == outputs else b.conv(f"{name}.shortcut", x, inputs, outputs, kernel=1)
    return b.node("Add", [around, hidden], f"{name}.sum")


def attention(b: Builder, name: str, x: str, channels: int) -> str:
    """Self-attention over the pixels, after a LayerNormalization, with a residual."""
    flat = b.node("Reshape", [x, b.constant(f"{name}.flat", np.array([0, channels, -1]))], f"{name}_flat")
    tokens = b.node("Transpose", [flat], f"{name}_tokens", perm=[0, 2, 1])
    normal = b.layer_norm(f"{name}.norm", tokens, channels)
    q, k, v = (b.linear(f"{name}.to_{kind}", normal, channels, channels, bias=False) for kind in "qkv")
    keys = b.node("Transpose", [k], f"{name}_keys", perm=[0, 2, 1])
    weights = b.node("Softmax", [b.node("MatMul", [q, keys], f"{name}_logits")], f"{name}_weights", axis=-1)
    mixed = b.node("MatMul", [weights, v], f"{name}_mixed")
    out = b.node("Add", [b.linear(f"{name}.to_out", mixed, channels, channels), tokens], f"{name}_residual")
    back = b.node("Transpose", [out], f"{name}_back", perm=[0, 2, 1])
    return b.node("Reshape", [back, b.node("Shape", [x], f"{name}_size")], f"{name}_output")


def denoiser(seed: int = 0, outlier: float = 1.0) -> Any:
    """``sample`` [batch, 4, 8, 8] and ``timestep`` [batch] to ``out_sample``; ``outlier`` scales one norm's channel."""
    b = Builder(seed)
    column = b.node("Unsqueeze", ["timestep", b.constant("time.axes", np.array([1]))], "time_column")
    frequencies = np.exp(-np.linspace(0, 6, WIDTH)).astype(np.float32)[None]
    angles = b.node("Mul", [column, b.constant("time.frequencies", frequencies)], "time_angles")
    embedding = b.node("Sin", [angles], "time_embedding")
    first = b.conv("conv_in", "sample", 4, WIDTH)
    down = residual(b, "down.0.res.0", first, WIDTH, WIDTH, embedding)
    middle = attention(b, "mid.0.attn.0", down, WIDTH)
    joined = b.node("Concat", [middle, first], "joined", axis=1)
    up = residual(b, "up.0.res.0", joined, 2 * WIDTH, WIDTH, embedding)
    b.conv("conv_out", b.norm_silu("norm_out", up, WIDTH), WIDTH, 4)
    b.nodes[-1].output[0] = "out_sample"
    if outlier != 1.0:
        for tensor in b.initializers:
            if tensor.name == "mid.0.attn.0.norm.weight":
                array = numpy_helper.to_array(tensor).copy()
                array[3] *= outlier
                tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    return _model(b, {"sample": ["batch", 4, "h", "w"], "timestep": ["batch"]}, "out_sample")


def chain() -> Any:
    """Four convolutions that read each other's outputs, without anything in between."""
    b = Builder()
    first = b.conv("conv_in", "sample", 4, WIDTH)
    second = b.conv("down.0.res.0.conv", first, WIDTH, WIDTH)
    b.conv("conv_out", b.conv("down.1.res.0.conv", second, WIDTH, WIDTH), WIDTH, 4)
    b.nodes[-1].output[0] = "out_sample"
    return _model(b, {"sample": ["batch", 4, "h", "w"]}, "out_sample")


def decoder(width: int = 0) -> Any:
    """``latent_sample`` to a picture of the same size; with ``width`` through a residual block of that many channels."""
    b = Builder(1)
    hidden, channels = "latent_sample", 4
    if width:
        first = b.conv("decoder.conv_in", hidden, channels, width)
        inner = b.conv("decoder.mid.0.conv1", b.norm_silu("decoder.mid.0.norm1", first, width), width, width)
        inner = b.conv("decoder.mid.0.conv2", b.norm_silu("decoder.mid.0.norm2", inner, width), width, width)
        hidden = b.norm_silu("decoder.norm_out", b.node("Add", [first, inner], "decoder.sum"), width)
        channels = width
    b.node("Tanh", [b.conv("decoder.conv", hidden, channels, 3)], "sample")
    return _model(b, {"latent_sample": ["batch", 4, "h", "w"]}, "sample")


def encoder() -> Any:
    """A picture ``sample`` to ``latent_sample`` of the same size."""
    b = Builder(2)
    b.conv("encoder.conv", "sample", 3, 4)
    b.nodes[-1].output[0] = "latent_sample"
    return _model(b, {"sample": ["batch", 3, "h", "w"]}, "latent_sample")


def _model(b: Builder, inputs: dict[str, list[Any]], output: str) -> Any:
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()]
    result = helper.make_tensor_value_info(output, TensorProto.FLOAT, None)
    graph = helper.make_graph(b.nodes, "graph", values, [result], b.initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return onnx.shape_inference.infer_shapes(model)


def write_bundle(
    folder: Path,
    seed: int = 0,
    outlier: float = 1.0,
    decoder_width: int = 0,
    with_encoder: bool = False,
    **changes: Any,
) -> Bundle:
    """An unconditional bundle of denoiser and decoder, and of an encoder where one is asked for."""
    axes = {"batch": Axis(1, 1, 4), "latent_height": Axis(2, SIZE, 64), "latent_width": Axis(2, SIZE, 64)}
    latent = ("batch", 4, "latent_height", "latent_width")
    picture = ("batch", 3, "latent_height", "latent_width")
    components = []
    networks = [
        (
            "unet",
            denoiser(seed, outlier),
            (TensorSpec("sample", "float32", latent), TensorSpec("timestep", "float32", ("batch",))),
            TensorSpec("out_sample", "float32", latent),
        ),
        (
            "vae_decoder",
            decoder(decoder_width),
            (TensorSpec("latent_sample", "float32", latent),),
            TensorSpec("sample", "float32", picture),
        ),
    ]
    if with_encoder:
        taken = (TensorSpec("sample", "float32", picture),)
        networks.append(("vae_encoder", encoder(), taken, TensorSpec("latent_sample", "float32", latent)))
    for name, model, inputs, output in networks:
        variant = tiny_bundles.write_graph(folder, f"{name}/model.onnx", model.SerializeToString())
        components.append(Component(name, inputs, (output,), axes, {"fp32": variant}))
    fields = {
        "task": "unconditional",
        "latent": Latent(4, 1, encoding="plain"),
        "schedule": tiny_bundles.SCHEDULE,
        "defaults": Defaults(SIZE, SIZE, "ddim", steps=6),
    }
    return tiny_bundles.write_bundle(folder, *components, **{**fields, **changes})

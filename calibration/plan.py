"""The plan: what is quantised, with which ranges, and why. Written as JSON to be read, edited and applied again."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from latentedge.runtime.errors import BundleError, LatentEdgeError
from latentedge.runtime.structured import structure

FORMAT = "latentedge-plan"
VERSION = 1

INT8 = "int8"
FLOAT = "float"


@dataclass(frozen=True)
class ActivationPlan:
    """The range of one activation: ``amax`` is the magnitude of INT8's 127, ``rule`` how it was found.

    ``smoothing`` is the exponent of SmoothQuant's balancing (arXiv:2211.10438), or ``None`` where it measured no better.
    ``error`` is the squared error of the outputs that read it, divided by their power, with and without (``plain``:
    absolute maximum, no balancing).
    """

    amax: float
    rule: str
    smoothing: float | None = None
    error: float | None = None
    plain: float | None = None


@dataclass(frozen=True)
class BlockPlan:
    """A group of layers that is decided on together, with what was measured of it alone.

    ``sqnr_db``: signal to quantisation noise of the denoiser's output, the mean over the probes;
    ``sqnr_db_by_timestep``: the mean over the probes of each timestep, pairs in rising order. ``psnr_db``: the picture's.
    ``seconds_saved`` of one evaluation of the denoiser on the target, ``seconds_error`` its standard error.
    """

    name: str
    precision: str
    reason: str
    layers: tuple[str, ...]
    sqnr_db: float | None = None
    sqnr_db_by_timestep: tuple[tuple[float, float], ...] = ()
    psnr_db: float | None = None
    seconds_saved: float | None = None
    seconds_error: float | None = None


@dataclass(frozen=True)
class Plan:
    """What becomes INT8 in one component."""

    component: str
    #: The engine that it was measured on: "openvino", "onnxruntime", "tensorrt"; and the precision by its name there.
    backend: str
    precision: str
    floor_db: float
    blocks: tuple[BlockPlan, ...]
    activations: dict[str, ActivationPlan]
    #: Layers that stay in higher precision by rule, with the reason.
    kept: dict[str, str] = field(default_factory=dict)
    #: Shortcut convolutions on concatenated inputs that are cut in two, one for each input's range.
    split: tuple[str, ...] = ()
    clip_weights: bool = True
    correct_bias: bool = True
    #: Q/DQ after convolutions, which ONNX Runtime needs to compute them in INT8 at all.
    quantise_outputs: bool = False
    #: The bundle's graph that is quantised, which is the type that everything else computes in: "fp32" or "fp16".
    floats: str = "fp32"
    #: How the statistics were taken: samples, steps, digest of the fp32 graph.
    calibration: dict[str, Any] = field(default_factory=dict)

    def quantised_blocks(self) -> frozenset[str]:
        """Names of the blocks that become INT8."""
        return frozenset(entry.name for entry in self.blocks if entry.precision == INT8)

    def with_blocks(self, names: frozenset[str]) -> Plan:
        """This plan with exactly the blocks ``names`` in INT8."""
        blocks = tuple(
            dataclasses.replace(entry, precision=INT8 if entry.name in names else FLOAT) for entry in self.blocks
        )
        return dataclasses.replace(self, blocks=blocks)

    def to_text(self) -> str:
        """The plan as JSON."""
        return json.dumps({"format": FORMAT, "version": VERSION, **dataclasses.asdict(self)}, indent=2) + "\n"

    def save(self, path: Path) -> None:
        """Write the plan, aside first and then renamed."""
        write_atomically(path, self.to_text().encode())

    @classmethod
    def load(cls, path: Path) -> Plan:
        """Read a plan; :class:`LatentEdgeError` names the field that is wrong."""
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise LatentEdgeError(f"the plan {path} cannot be read: {error}.") from error
        if not isinstance(data, dict) or data.get("format") != FORMAT or data.get("version") != VERSION:
            raise LatentEdgeError(f"{path} is no {FORMAT} of version {VERSION}.")
        body = {name: value for name, value in data.items() if name not in ("format", "version")}
        try:
            plan = structure(cls, body, "")
        except BundleError as error:
            raise LatentEdgeError(f"{path}: {error.message.replace('the manifest', 'the plan')}") from error
        for block in plan.blocks:
            if block.precision not in (INT8, FLOAT):
                raise LatentEdgeError(f"{path}: block {block.name} has precision {block.precision!r}: int8 or float.")
        for tensor, activation in plan.activations.items():
            if not (np.isfinite(activation.amax) and activation.amax >= 0):
                raise LatentEdgeError(f"{path}: the range of {tensor} is {activation.amax}: a finite magnitude.")
        return plan


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file aside, flush it to the disk, and rename it, so that a reader sees all of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    with aside.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    aside.replace(path)

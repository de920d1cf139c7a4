"""What a source hands to the exporter: components to build one after the other, and the manifest's facts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from latentedge.runtime.bundle import Array, Component, Conditioning, Defaults, Latent, Source

if TYPE_CHECKING:
    import onnx_ir as ir
    import torch

#: Sample inputs of a component for given axis lengths; the generator makes them reproducible.
SampleInputs = Callable[[Mapping[str, int], np.random.Generator], dict[str, Array]]


@dataclass(frozen=True)
class ComponentSource:
    """One network of the source model.

    ``build`` loads the weights and returns the module in evaluation mode; the exporter drops it before it builds
    the next one. ``forward`` takes the inputs positionally in the order of ``spec.inputs`` and returns a tensor, or a
    tuple in the order of ``spec.outputs``. ``build`` is ``None`` when the source is already ONNX: then
    ``onnx_files`` holds the graph by precision and there is no reference to compare with.
    """

    spec: Component
    build: Callable[[], torch.nn.Module] | None
    sample_inputs: SampleInputs
    #: Axis lengths to trace with, and further ones to compare on (other batch sizes and picture sizes).
    trace_axes: dict[str, int] = field(default_factory=dict)
    compare_axes: tuple[dict[str, int], ...] = ()
    #: The lowest timestep that the network takes; some take its logarithm.
    lowest_timestep: float = 0.0
    onnx_files: dict[str, Path] = field(default_factory=dict)
    #: Changes a graph of ``onnx_files`` in place, so that it takes and gives what ``spec`` declares.
    adapt: Callable[[ir.Model], None] | None = None
    #: diffusers' or transformers' description of the network, written beside its graph for other tools.
    config: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class TokenizerSource:
    """A tokenizer to write into the bundle: a ``tokenizers.Tokenizer`` serialised with padding and truncation set."""

    json: str
    length: int
    golden: dict[str, tuple[int, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class SourceModel:
    """A model as a source found it: facts for the manifest, and components that are built on demand."""

    family: str
    task: str
    source: Source
    latent: Latent
    conditioning: Conditioning
    schedule: dict[str, object]
    defaults: Defaults
    components: tuple[ComponentSource, ...]
    tokenizers: dict[str, TokenizerSource] = field(default_factory=dict)
    #: diffusers' model_index.json, so that other tools open the bundle too.
    model_index: dict[str, object] = field(default_factory=dict)
    #: Captions that came with the checkpoint: "prompts" for calibration, "held_out_prompts" for judging it.
    captions: dict[str, tuple[str, ...]] = field(default_factory=dict)
    #: What the user should know: defaults that were assumed, a tokenizer that is missing.
    messages: tuple[str, ...] = ()


@dataclass(frozen=True)
class SourceOptions:
    """What the user may say about a source on the command line."""

    config: Path | None = None
    tokenizer: str | None = None
    loras: tuple[tuple[Path, float], ...] = ()
    #: Only latents that the UNet can halve as often as it does, which lets its upsampling be computed faster.
    even_sizes: bool = False

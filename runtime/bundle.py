"""The bundle: a folder with components, a tokenizer and one manifest, ``latentedge.json``.

Every tensor is declared once, here. Dynamic axes, engine profiles, buffers and input checks all derive from
these declarations. The format is described in ``docs/bundle.md``.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from latentedge.runtime.errors import BundleError, UsageError
from latentedge.runtime.structured import structure

MANIFEST_NAME = "latentedge.json"
FORMAT = "latentedge-bundle"
VERSION = 1

#: Bytes of weights from which on they lie in a file beside their graph: engines map that file and need not hold it twice.
EXTERNAL_DATA_LIMIT = 64 << 20

#: A tensor's side: a fixed length, an axis by name, or a multiple of one such as ``"8*latent_height"``.
Dimension = int | str
Array = NDArray[Any]

_DIMENSION = re.compile(r"(?:(?P<factor>\d+)\*)?(?P<axis>[a-z][a-z0-9_]*)\Z")


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of a component: ONNX name, numpy dtype name, and shape by axis."""

    name: str
    dtype: str
    shape: tuple[Dimension, ...]

    def resolve(self, axes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape with every axis replaced by its length in ``axes``; :class:`UsageError` names a missing one."""
        return tuple(resolve_dimension(side, axes) for side in self.shape)


@dataclass(frozen=True)
class Axis:
    """Allowed lengths of a dynamic axis; ``opt`` is the one that engines are tuned for.

    A length must be a multiple of ``multiple`` (a UNet that halves its latent three times takes multiples of 8).
    """

    min: int
    opt: int
    max: int
    multiple: int = 1


@dataclass(frozen=True)
class Variant:
    """One precision of a component: file inside the bundle, digest of graph and weights, and how it was measured.

    ``measured`` holds records such as ``{"kind": "parity", "psnr_db": ...}`` or
    ``{"kind": "latency", "backend": ..., "machine": ..., "seconds": ..., "ratio": ...}``.
    ``external_data`` are weight files beside the graph (:data:`EXTERNAL_DATA_LIMIT`).
    """

    path: str
    sha256: str
    size: int
    external_data: dict[str, str] = field(default_factory=dict)
    measured: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class Component:
    """A network of the bundle: what goes in, what comes out, in which precisions it is there."""

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    axes: dict[str, Axis]
    variants: dict[str, Variant] = field(default_factory=dict)
    parity: dict[str, Any] = field(default_factory=dict)

    def input(self, name: str) -> TensorSpec:
        """The declared input ``name``; :class:`UsageError` lists the inputs where there is none."""
        return _by_name(self.inputs, name, f"{self.name} has no input")

    def output(self, name: str) -> TensorSpec:
        """The declared output ``name``; :class:`UsageError` lists the outputs where there is none."""
        return _by_name(self.outputs, name, f"{self.name} has no output")

    def has_input(self, name: str) -> bool:
        """Whether ``name`` is among the inputs."""
        return any(spec.name == name for spec in self.inputs)

    def axes_of(self, arrays: Mapping[str, Array]) -> dict[str, int]:
        """Solve the axes from the shapes of all inputs, checking dtype, rank, fixed sides and consistency."""
        missing = [spec.name for spec in self.inputs if spec.name not in arrays]
        unknown = [name for name in arrays if not self.has_input(name)]
        if missing or unknown:
            expected = ", ".join(spec.name for spec in self.inputs)
            raise UsageError(f"{self.name} takes the inputs {expected}; missing {missing}, unknown {unknown}.")
        axes: dict[str, int] = {}
        for spec in self.inputs:
            solve_axes(self.name, spec, arrays[spec.name], axes)
        return axes


@dataclass(frozen=True)
class Latent:
    """The latent space. ``encoded = scale_factor * (z - shift_factor)``; the decoder takes ``z``."""

    channels: int
    downscale: int
    scale_factor: float = 1.0
    shift_factor: float = 0.0
    #: "kl": the encoder gives moments (mean first); "vq": it gives the latent before the codebook; "plain": the latent.
    encoding: str = "kl"
    #: Range of the picture that encoder and decoder work in.
    image_range: tuple[float, float] = (-1.0, 1.0)
    #: Least-squares map from latent channels to RGB in 0..1: ``[channels + 1][3]``, the last row is the offset.
    preview: tuple[tuple[float, float, float], ...] | None = None


@dataclass(frozen=True)
class TextEncoder:
    """One text encoder: its component, tokenizer, and the outputs that the UNet takes."""

    component: str
    tokenizer: str | None
    #: Output used as ``encoder_hidden_states``; several encoders are joined along the width.
    output: str = "last_hidden_state"
    #: Output used as ``text_embeds``, where the UNet takes one.
    pooled_output: str | None = None


@dataclass(frozen=True)
class ConcatInput:
    """A conditioning picture that is appended to the UNet's ``sample`` after the latent, in the listed order.

    ``source``: "masked_image_latent" and "image_latent" (encoder output), "mask" (resized to the latent),
    "low_resolution_image" (as is), "segmentation" (through ``cond_encoder``).
    """

    source: str
    channels: int
    #: The encoder's output is multiplied by the latent's ``scale_factor``.
    scaled: bool = False
    #: KL encoders: "mode", or "sample" (draws noise).
    posterior: str = "mode"
    #: Values of (keep, paint) in a mask.
    mask_values: tuple[float, float] = (0.0, 1.0)
    #: What stands in the hole of a masked picture, in -1..1: black (-1) in CompVis's models, grey (0) in diffusers'.
    hole_value: float = 0.0


@dataclass(frozen=True)
class Layout:
    """How a layout's boxes become tokens (``docs/bundle.md``)."""

    length: int
    max_objects: int
    tokens: int
    none_token: int
    crop: bool
    #: Number of object classes; ``None`` when the checkpoint does not tell.
    classes: int | None = None


@dataclass(frozen=True)
class Conditioning:
    """What steers the denoiser, and how the runtime makes it."""

    #: What ``encoder_hidden_states`` holds: "none", "text", "class", "layout", "embeddings". A UNet with an input
    #: ``class_labels`` takes the class itself.
    cross_attention: str = "none"
    encoders: tuple[TextEncoder, ...] = ()
    concat: tuple[ConcatInput, ...] = ()
    #: The unconditional input of guidance: "empty_text", "zeros", "null_class", "none" (guidance is refused).
    unconditional: str = "none"
    classes: int | None = None
    null_class: int | None = None
    #: Labels of a semantic map, for the one-hot encoding.
    labels: int | None = None
    layout: Layout | None = None
    #: Width of CLIP embeddings that the caller brings.
    embedding_width: int | None = None
    #: Number of SDXL-style time ids (original size, crop, target size).
    time_ids: int | None = None
    #: Width of the guidance embedding ``timestep_cond`` (latent consistency models).
    guidance_embedding: int | None = None
    #: ``True``: every scale but 1 is guided. ``False``: only scales above 1 are, the others leave guidance off.
    guidance_below_one: bool = True
    #: Instruct-pix2pix: guidance on text and on the picture, three evaluations in one batch.
    image_guidance: bool = False
    #: Factor from the low-resolution picture to the result.
    upscale: int | None = None


@dataclass(frozen=True)
class Defaults:
    """What ``generate`` uses when the caller does not say."""

    height: int
    width: int
    sampler: str | None = None
    steps: int = 50
    guidance_scale: float = 1.0
    eta: float = 0.0
    #: How far a starting picture is noised, 0 to 1.
    strength: float = 0.75
    image_guidance_scale: float = 1.5


@dataclass(frozen=True)
class TokenizerFile:
    """A tokenizer.json of the bundle, and token ids recorded at export that ``verify`` compares.

    ``golden`` maps a prompt to the ids that the original tokenizer gave.
    """

    path: str
    sha256: str
    length: int
    golden: dict[str, tuple[int, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Source:
    """Where the weights came from: layout, SHA-256 by file name, and licence as far as it is known."""

    layout: str
    files: dict[str, str]
    licence: str | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Manifest:
    """``latentedge.json``. The runtime reads nothing else to know what to do."""

    family: str
    task: str
    source: Source
    created_with: dict[str, str]
    latent: Latent
    conditioning: Conditioning
    #: scheduler_config field names, plus ``dialect`` ("compvis" or "diffusers") and ``ancestral_tables``.
    schedule: dict[str, Any]
    defaults: Defaults
    components: dict[str, Component]
    tokenizers: dict[str, TokenizerFile] = field(default_factory=dict)
    calibration: dict[str, Any] = field(default_factory=dict)
    #: SHA-256 of what the export wrote beside all that: reports, and descriptions for other tools.
    files: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The manifest as plain JSON data."""
        return {"format": FORMAT, "version": VERSION, **dataclasses.asdict(self)}

    def scheduler_config(self) -> dict[str, Any]:
        """The fields of ``schedule`` that other tools know, as ``scheduler_config.json`` has them."""
        return {name: value for name, value in self.schedule.items() if name not in ("dialect", "ancestral_tables")}


@dataclass(frozen=True)
class Bundle:
    """An opened bundle: its folder and its manifest."""

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: str | Path) -> Bundle:
        """Read the manifest of the bundle at ``path``; :class:`BundleError` if it is missing, damaged or too new."""
        folder = Path(path)
        file = folder / MANIFEST_NAME
        if not file.is_file():
            raise BundleError(
                f"{folder} is not a bundle: it has no {MANIFEST_NAME}.",
                hint=f"make one with `latentedge export SOURCE -o {folder}`",
            )
        try:
            data = json.loads(file.read_text(encoding="utf-8"))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise BundleError(f"{file} is damaged: {error}.", hint="export the checkpoint again") from error
        return cls(folder, manifest_from_json(data, file))

    def file(self, relative: str) -> Path:
        """A file of the bundle; :class:`BundleError` when it lies outside of it or is not there."""
        path = self.path / contained_path(relative)
        if not path.is_file():
            raise BundleError(f"{path} is missing from the bundle.", hint="export the checkpoint again")
        return path

    def component(self, name: str) -> Component:
        """The component ``name``; :class:`UsageError` lists the components where there is none."""
        components = self.manifest.components
        if name not in components:
            raise UsageError(f"{self.path} has no component {name!r}; it has: {', '.join(components)}.")
        return components[name]

    def variant(self, name: str, precision: str) -> tuple[Path, Variant]:
        """File and record of one precision of a component; :class:`UsageError` lists the precisions that are there."""
        variants = self.component(name).variants
        if precision not in variants:
            raise UsageError(
                f"{name} is not in this bundle in {precision}; it is there in: {', '.join(variants)}.",
                hint=f"write it with `latentedge export ... --precision fp32,{precision}`",
            )
        return self.file(variants[precision].path), variants[precision]

    def check_graphs(self, name: str, precision: str) -> None:
        """Compare the graph of a component (and of the parts it was split into) with its digest, before it runs.

        Of weights beside a graph only the size is compared, the rest is left to ``latentedge verify``;
        :class:`BundleError` names a damaged file.
        """
        for component in self.manifest.components.values():
            variant = component.variants.get(graph_precision(precision))
            if component.name.split(".")[0] != name or variant is None:
                continue
            path = self.file(variant.path)
            if file_sha256(path) != variant.sha256:
                raise BundleError(
                    f"{path} is damaged: its SHA-256 is not the manifest's.", hint="export the checkpoint again"
                )
            size = sum(file.stat().st_size for file in (path, *map(self.file, variant.external_data)))
            if size != variant.size:
                raise BundleError(
                    f"{path} with its weights is damaged: it holds {size:,} bytes, the manifest says {variant.size:,}.",
                    hint="export the checkpoint again",
                )

    def digest(self) -> str:
        """SHA-256 of the manifest file, which holds the digest of every other file."""
        return file_sha256(self.path / MANIFEST_NAME)


def graph_precision(precision: str) -> str:
    """The variant that holds a precision's graph: bf16 is computed from the fp32 graph, "int8+bf16" from the int8 one."""
    graph = precision.partition("+")[0]
    return "fp32" if graph == "bf16" else graph


def contained_path(relative: str) -> PurePosixPath:
    """``relative`` as a path that stays inside the bundle; :class:`BundleError` otherwise."""
    path = PurePosixPath(relative)
    if path.is_absolute() or ".." in path.parts or "\\" in relative:
        raise BundleError(f"the manifest names {relative!r}, which lies outside of the bundle.")
    return path


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex, read in pieces of 1 MiB."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while piece := stream.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def resolve_dimension(side: Dimension, axes: Mapping[str, int]) -> int:
    """The length of one side of a shape for given axes."""
    if isinstance(side, int):
        return side
    factor, axis = split_dimension(side)
    if axis not in axes:
        raise UsageError(f"the axis {axis!r} was not given; given are: {dict(axes)}.")
    return factor * axes[axis]


def split_dimension(side: str) -> tuple[int, str]:
    """``"8*latent_height"`` as ``(8, "latent_height")``; :class:`BundleError` for anything else."""
    match = _DIMENSION.match(side)
    if match is None:
        raise BundleError(f"{side!r} is no dimension: expected an integer, an axis, or a multiple like '8*axis'.")
    return int(match["factor"] or 1), match["axis"]


def solve_axes(owner: str, spec: TensorSpec, array: Array, axes: dict[str, int]) -> None:
    """Check one array against its declaration and add the axes that its shape tells."""
    if array.dtype != np.dtype(spec.dtype):
        raise UsageError(f"{owner} input {spec.name}: expected {spec.dtype}, found {array.dtype}.")
    if array.ndim != len(spec.shape):
        raise UsageError(f"{owner} input {spec.name}: expected shape {list(spec.shape)}, found {list(array.shape)}.")
    for side, length in zip(spec.shape, array.shape, strict=True):
        factor, axis = (1, None) if isinstance(side, int) else split_dimension(side)
        wanted = side if isinstance(side, int) else axes.get(str(axis), length // factor) * factor
        if length != wanted or length < 1:
            raise UsageError(
                f"{owner} input {spec.name}: expected shape {list(spec.shape)} with {axes}, found {list(array.shape)}."
            )
        if axis is not None:
            axes[axis] = length // factor


def _by_name(specs: tuple[TensorSpec, ...], name: str, what: str) -> TensorSpec:
    for spec in specs:
        if spec.name == name:
            return spec
    raise UsageError(f"{what} {name!r}; it has: {', '.join(spec.name for spec in specs)}.")


def manifest_from_json(data: Any, origin: Path) -> Manifest:
    """A manifest from JSON data, with every field's type checked; :class:`BundleError` names the field."""
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise BundleError(f"{origin} is not a {FORMAT} manifest.")
    if data.get("version") != VERSION:
        raise BundleError(
            f"{origin} is of bundle version {data.get('version')}; this runtime reads version {VERSION}.",
            hint="install the latentedge version that wrote it, or export the checkpoint again",
        )
    body = {key: value for key, value in data.items() if key not in ("format", "version")}
    manifest = structure(Manifest, body, "")
    for component in manifest.components.values():
        for variant in component.variants.values():
            contained_path(variant.path)
    return manifest

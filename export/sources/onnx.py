"""Folders that optimum exported: ``model_index.json`` and one ONNX graph for each part, without the original.

There is nothing to compare such graphs with, and the manifest says so. Their tensors are brought to the bundle's
contract (``onnx_contract.py``); everything else is read from the configurations, as for the diffusers layout.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from latentedge.export.model import ComponentSource, SourceModel, SourceOptions
from latentedge.export.sources.diffusers_kinds import PIPELINES, Kind
from latentedge.export.sources.diffusers_loading import Part, read_json
from latentedge.export.sources.diffusers_pipelines import Parts, describe
from latentedge.export.sources.onnx_contract import Graph, read_graph
from latentedge.runtime.errors import LatentEdgeError, UsageError

#: What optimum and old versions of diffusers put before a pipeline's name.
PREFIXES = ("ORT", "Onnx")
NEEDED = ("unet", "vae_decoder")


def matches(path: Path | str, options: SourceOptions) -> bool:
    """Whether ``path`` is a folder with ``model_index.json`` and ``unet/model.onnx``."""
    del options
    folder = Path(path)
    return (folder / "model_index.json").is_file() and (folder / "unet" / "model.onnx").is_file()


def load(path: Path | str, options: SourceOptions) -> SourceModel:
    """Describe the exported pipeline at ``path``; :class:`LatentEdgeError` where graphs do not meet the contract."""
    if options.config is not None or options.loras:
        raise UsageError("a folder of ONNX graphs takes no --config, and LoRA files cannot be merged into it.")
    if options.even_sizes:
        raise UsageError(
            "the upsampling of a graph that is already ONNX stays as it is: it takes no --even-sizes.",
            hint="export the checkpoint that the graphs were made of",
        )
    folder = Path(path)
    index = read_json(folder / "model_index.json")
    name = str(index.get("_class_name"))
    for prefix in PREFIXES:
        name = name.removeprefix(prefix)
    if name not in PIPELINES:
        raise LatentEdgeError(
            f"{folder} is a {index.get('_class_name')}, which this export does not know.",
            hint=f"known are: {', '.join(sorted(PIPELINES))}",
        )
    for part in NEEDED:
        if not (folder / part / "model.onnx").is_file():
            raise LatentEdgeError(f"{folder / part / 'model.onnx'} is missing.", hint="copy the whole folder")
    kind = PIPELINES[name]
    graphs = {file.parent.name: read_graph(file) for file in sorted(folder.glob("*/model.onnx"))}
    model = describe(folder, index, kind, _parts(folder, kind, graphs), options, layout="onnx")
    components, messages = [], []
    for component in model.components:
        graph = graphs.get(_folder_of(component.spec.name, graphs))
        if graph is not None:
            components.append(_from_graph(component, graph))
            messages += graph.messages(component.spec)
        else:
            messages.append(f"the folder has no {component.spec.name}; what needs it is refused")
    latent = model.latent
    if "vae_encoder" in graphs:
        latent = replace(latent, encoding=graphs["vae_encoder"].encoding())
    return replace(model, components=tuple(components), latent=latent, messages=(*model.messages, *messages))


def _folder_of(component: str, graphs: Mapping[str, Graph]) -> str:
    return "bert" if component == "text_encoder" and "bert" in graphs else component


def _parts(folder: Path, kind: Kind, graphs: Mapping[str, Graph]) -> Parts:
    def part(name: str, config: Mapping[str, Any], class_name: str) -> Part:
        return Part(name, class_name, folder / name, config, tuple(graphs[name].files), None)

    unet = read_json(folder / "unet" / "config.json")
    unet.setdefault("_class_name", "UNet2DConditionModel")
    stage = read_json(_first_stage_config(folder))
    stage_kind = str(stage.get("_class_name", "AutoencoderKL"))
    encoders = [(name, tokenizer) for name, tokenizer in kind.text if name in graphs]
    texts = []
    for name, _ in encoders:
        config = read_json(folder / name / "config.json")
        texts.append(part(name, config, str((config.get("architectures") or ["CLIPTextModel"])[0])))
    return Parts(
        part("unet", unet, str(unet["_class_name"])),
        part("vae_decoder", stage, stage_kind),
        tuple(texts),
        tuple(folder / tokenizer for _, tokenizer in encoders),
    )


def _first_stage_config(folder: Path) -> Path:
    """Both halves have the whole first stage's configuration; older folders keep it in one place."""
    places = [folder / name / "config.json" for name in ("vae_decoder", "vae_encoder", "vae", "vqvae")]
    return next((place for place in places if place.is_file()), places[0])


def _from_graph(component: ComponentSource, graph: Graph) -> ComponentSource:
    spec = graph.fitted(component.spec)
    return replace(
        component,
        spec=spec,
        build=None,
        compare_axes=(),
        onnx_files={graph.precision: graph.path},
        adapt=lambda model: graph.adapt(model, spec),
    )

"""Checkpoint layouts by name. A new one is one module here and one line in :data:`SOURCES`.

A source module has ``matches(path: Path | str, options) -> bool``, cheap and without torch, and
``load(path, options) -> SourceModel``. The first that matches, in the order of the dict, is taken.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

from latentedge.export.model import SourceModel, SourceOptions
from latentedge.runtime.errors import UsageError

SOURCES: dict[str, str] = {
    "diffusers": "latentedge.export.sources.diffusers",
    "compvis": "latentedge.export.sources.compvis",
    "single-file": "latentedge.export.sources.single_file",
    "onnx": "latentedge.export.sources.onnx",
}


def load_source(path: str | Path, options: SourceOptions) -> SourceModel:
    """Read the checkpoint at ``path`` (a folder, a file or a hub id) with the first layout that fits it."""
    for module in map(_module, SOURCES):
        if module.matches(path, options):
            model: SourceModel = module.load(path, options)
            return model
    missing = not Path(path).exists()
    raise UsageError(
        f"there is no {path}." if missing else f"{path} is no checkpoint that latentedge reads.",
        hint=(
            "a CompVis folder holds one .ckpt or .safetensors and one .yaml, a diffusers folder holds model_index.json, "
            "an ONNX folder holds unet/model.onnx; a single CompVis file takes --config FILE"
        ),
    )


def _module(name: str) -> ModuleType:
    return importlib.import_module(SOURCES[name])

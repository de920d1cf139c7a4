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

#: Names of a folder's files that an error lists before it only counts.
LISTED = 10
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
    place = Path(path)
    found = "a file"
    if place.is_dir():
        names = sorted(file.name for file in place.iterdir())
        found = ", ".join(names[:LISTED]) + (f" and {len(names) - LISTED} more" if len(names) > LISTED else "")
    raise UsageError(
        f"{path} is no checkpoint that latentedge reads; found {found or 'an empty folder'}."
        if place.exists()
        else f"there is no {path}.",
        hint=(
            "a CompVis folder holds one .ckpt or .safetensors and one .yaml, a diffusers folder holds model_index.json, "
            "an ONNX folder holds unet/model.onnx; a single CompVis file takes --config FILE"
        ),
    )


def _module(name: str) -> ModuleType:
    return importlib.import_module(SOURCES[name])

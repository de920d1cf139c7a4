"""diffusers layout: a folder with ``model_index.json``, a folder of one autoencoder, or a hub id.

The networks are diffusers' and transformers' own; each is loaded when it is exported and freed before the next.
"""

from __future__ import annotations

import re
from pathlib import Path

from latentedge.export.model import SourceModel, SourceOptions
from latentedge.export.sources.diffusers_kinds import PIPELINES
from latentedge.export.sources.diffusers_loading import library, read_json
from latentedge.export.sources.diffusers_pipelines import read_first_stage, read_pipeline
from latentedge.runtime.errors import LatentEdgeError, UsageError

FIRST_STAGES = ("AutoencoderKL", "VQModel", "AutoencoderTiny")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+\Z")
HUB_FILES = ("model_index.json", "scheduler/*.json", "tokenizer*/*", "*/config.json", "*/*.index.json")


def matches(path: Path | str, options: SourceOptions) -> bool:
    """Whether ``path`` is a diffusers folder with torch weights, a folder of one first stage, or a hub id."""
    del options
    folder = Path(path)
    if folder.is_dir():
        index = folder / "model_index.json"
        if index.is_file():
            return not any((folder / name / "model.onnx").is_file() for name in ("unet", "vae_decoder"))
        config = folder / "config.json"
        return config.is_file() and read_json(config).get("_class_name") in FIRST_STAGES
    return not folder.exists() and not folder.suffix and HUB_ID.match(str(path)) is not None


def load(path: Path | str, options: SourceOptions) -> SourceModel:
    """Describe the pipeline at ``path``.

    Raises :class:`~latentedge.runtime.errors.MissingDependencyError` without the extra, and
    :class:`~latentedge.runtime.errors.LatentEdgeError` for a pipeline that is not known or a damaged folder.
    """
    if options.config is not None:
        raise UsageError("a diffusers folder brings its own configuration; it takes no --config.")
    library("diffusers")
    library("transformers")
    folder = Path(path) if Path(path).is_dir() else _download(str(path))
    if not (folder / "model_index.json").is_file():
        return read_first_stage(folder)
    index = read_json(folder / "model_index.json")
    name = str(index.get("_class_name"))
    if name not in PIPELINES:
        raise LatentEdgeError(
            f"{folder} is a {name}, which this export does not know.", hint=f"known are: {', '.join(sorted(PIPELINES))}"
        )
    return read_pipeline(folder, index, PIPELINES[name], options)


def _download(name: str) -> Path:
    """The folder of a hub id in the local cache: configurations, tokenizers, and one set of weights for each part."""
    hub = library("huggingface_hub")
    try:
        files: list[str] = hub.list_repo_files(name)
        wanted = [*HUB_FILES, *_weight_files(files)]
        return Path(hub.snapshot_download(name, allow_patterns=wanted))
    except (OSError, ValueError, hub.errors.HfHubHTTPError, *_connection_errors()) as error:
        raise LatentEdgeError(
            f"{name} is no folder here, and it could not be downloaded: {str(error).splitlines()[0]}",
            hint="check the path, or download the checkpoint on a machine that reaches the hub and give its folder",
        ) from error


def _connection_errors() -> tuple[type[Exception], ...]:
    """What the hub's client raises without a network; it changed from requests to httpx in its version 1."""
    found: list[type[Exception]] = []
    for module, name in (("httpx", "HTTPError"), ("httpx2", "HTTPError"), ("requests", "RequestException")):
        try:
            found.append(getattr(library(module), name))
        except LatentEdgeError:
            continue
    return tuple(found)


def _weight_files(files: list[str]) -> list[str]:
    """The smallest set of weights of each component: safetensors if there are any, without variants if possible."""
    chosen: list[str] = []
    parts: dict[str, list[str]] = {}
    for file in files:
        part, _, name = file.rpartition("/")
        if name.endswith((".safetensors", ".bin")) and part and "/" not in part:
            parts.setdefault(part, []).append(file)
    for names in parts.values():
        safe = [name for name in names if name.endswith(".safetensors")] or names
        plain = [name for name in safe if not re.search(r"\.(fp16|bf16|non_ema)[.-]", name)]
        chosen += plain or safe
    return [name for name in chosen if not name.startswith(("safety_checker/", "image_encoder/"))]

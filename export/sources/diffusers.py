"""diffusers layout: a folder with ``model_index.json``, a folder of one autoencoder, or a hub id.

The networks are diffusers' and transformers' own; each is loaded when it is exported and freed before the next.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from latentedge.export.model import SourceModel, SourceOptions
from latentedge.export.sources.diffusers_kinds import PIPELINES
from latentedge.export.sources.diffusers_loading import library, quiet, read_json, weight_files
from latentedge.export.sources.diffusers_pipelines import read_first_stage, read_pipeline
from latentedge.runtime.errors import LatentEdgeError, UsageError

FIRST_STAGES = ("AutoencoderKL", "VQModel", "AutoencoderTiny")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+\Z")
#: How long the hub may take to answer what a repository holds.
HUB_SECONDS = 10
HUB_FILES = (
    "model_index.json",
    "scheduler/*.json",
    "tokenizer*/*",
    "*/config.json",
    "*/*.index.json",
    "*/*.index.*.json",
)


def matches(path: Path | str, options: SourceOptions) -> bool:
    """Whether ``path`` is a diffusers folder with torch weights, a folder of one model of diffusers, or a hub id."""
    del options
    folder = Path(path)
    if folder.is_dir():
        index = folder / "model_index.json"
        if index.is_file():
            # Some published folders hold graphs beside the weights; the weights are what can be compared with.
            exported = any((folder / name / "model.onnx").is_file() for name in ("unet", "vae_decoder"))
            return not exported or bool(weight_files(folder / "unet"))
        config = folder / "config.json"
        return config.is_file() and "_class_name" in read_json(config)
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
    folder, messages = (Path(path), ()) if Path(path).is_dir() else _download(str(path))
    try:
        model = _read(folder, options)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise LatentEdgeError(
            f"a config.json in {folder} lacks a field or has one of another kind: {type(error).__name__}, {error}.",
            hint="copy or download the whole checkpoint folder again; --debug shows where it was read",
        ) from error
    return replace(model, messages=(*messages, *model.messages))


def _read(folder: Path, options: SourceOptions) -> SourceModel:
    if not (folder / "model_index.json").is_file():
        part = read_json(folder / "config.json").get("_class_name")
        if part not in FIRST_STAGES:
            raise UsageError(
                f"{folder} is a {part} alone, which draws nothing without the other parts of its pipeline.",
                hint="give the folder that holds model_index.json; a first stage alone can be exported: "
                + ", ".join(FIRST_STAGES),
            )
        return read_first_stage(folder)
    index = read_json(folder / "model_index.json")
    if "_class_name" not in index:
        raise LatentEdgeError(
            f"{folder / 'model_index.json'} names no pipeline class.",
            hint="copy or download the whole checkpoint folder",
        )
    name = str(index["_class_name"])
    if name not in PIPELINES:
        raise LatentEdgeError(
            f"{folder} is a {name}, which this export does not know.", hint=f"known are: {', '.join(sorted(PIPELINES))}"
        )
    return read_pipeline(folder, index, PIPELINES[name], options)


def _download(name: str) -> tuple[Path, tuple[str, ...]]:
    """The folder of a hub id in the local cache, and messages.

    Configurations, tokenizers and one set of weights for each part are downloaded; without the hub, what an earlier
    download left in the cache is taken.
    """
    hub = library("huggingface_hub")
    failures = (OSError, ValueError, hub.errors.HfHubHTTPError, *_connection_errors())
    try:
        with quiet():
            described = hub.model_info(name, timeout=HUB_SECONDS)
            wanted = [*HUB_FILES, *_weight_files([entry.rfilename for entry in described.siblings or ()])]
            return Path(hub.snapshot_download(name, allow_patterns=wanted)), ()
    except failures as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(". ")
    try:
        with quiet():
            cached = Path(hub.snapshot_download(name, local_files_only=True))
    except failures as error:
        raise LatentEdgeError(
            f"{name} is no folder or file here, not in the hub's local cache, and could not be downloaded: {reason}.",
            hint="check the path, or download the checkpoint on a machine that reaches the hub and give its folder",
        ) from error
    return cached, (f"{name} is taken from the hub's local cache as it is, for the hub does not answer: {reason}",)


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
    """One set of weights of each component, by the preferences of the library that loads it."""
    chosen: list[str] = []
    parts: dict[str, list[str]] = {}
    for file in files:
        part, _, name = file.rpartition("/")
        if name.endswith((".safetensors", ".bin")) and part and "/" not in part:
            parts.setdefault(part, []).append(file)
    for part, names in parts.items():
        safe = [name for name in names if name.endswith(".safetensors")]
        if part.startswith(("text_encoder", "bert")):  # transformers takes any safetensors before a pickle
            names = safe or names
        plain = [name for name in names if not re.search(r"\.(fp16|bf16|non_ema)[.-]", name)]
        chosen += [name for name in plain if name in safe] or plain or safe or names
    return [name for name in chosen if not name.startswith(("safety_checker/", "image_encoder/"))]

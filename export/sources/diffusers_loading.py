"""One component of a diffusers folder at a time: found and loaded strictly."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import json
import logging
import pickle
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from latentedge.runtime.errors import LatentEdgeError, MissingDependencyError

#: Classes of components by the name that model_index.json gives; the module they are in.
CLASSES = {
    "UNet2DConditionModel": "diffusers",
    "UNet2DModel": "diffusers",
    "AutoencoderKL": "diffusers",
    "VQModel": "diffusers",
    "AutoencoderTiny": "diffusers",
    "CLIPTextModel": "transformers",
    "CLIPTextModelWithProjection": "transformers",
    "LDMBertModel": "diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion",
}
WEIGHT_NAMES = ("diffusion_pytorch_model", "model", "pytorch_model")
WEIGHT_SUFFIXES = (".safetensors", ".bin")
#: What a part's file name holds where the weights lie in several.
SHARD = re.compile(r"-\d{5}-of-\d{5}\.")
LISTED_KEYS = 10
#: What the libraries raise for files that are damaged or of another model.
READING_ERRORS = (
    OSError,
    ValueError,
    RuntimeError,
    KeyError,
    TypeError,
    AttributeError,
    IndexError,
    EOFError,
    pickle.UnpicklingError,
    SafetensorError,
)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the libraries' notices and progress bars from the terminal; what matters here is checked and raised."""
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    loaded = [sys.modules.get(f"{name}.utils.logging") for name in ("diffusers", "transformers")]
    bars = [module for module in loaded if module is not None and module.is_progress_bar_enabled()]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    for module in bars:
        module.disable_progress_bar()
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        for module in bars:
            module.enable_progress_bar()


def library(name: str) -> Any:
    """Import a library of the ``diffusers`` extra; :class:`MissingDependencyError` names the extra."""
    try:
        with quiet():
            return importlib.import_module(name)
    except ImportError as error:
        raise MissingDependencyError(
            f"a diffusers checkpoint needs the library {name.partition('.')[0]}: {error}.",
            hint="pip install 'latentedge[export,diffusers]'",
        ) from error


@dataclass(frozen=True)
class Part:
    """A component's folder: which class it is, its configuration, and the weight files to read."""

    name: str
    kind: str
    folder: Path
    config: Mapping[str, Any]
    files: tuple[Path, ...]
    #: diffusers' name for a set of weight files such as "fp16"; ``None``: the plain one.
    variant: str | None


def read_part(root: Path, name: str, kind: str) -> Part:
    """Describe the component ``name`` of ``root``; ``name`` may be "" for ``root`` itself."""
    folder = root / name
    if kind not in CLASSES:
        raise LatentEdgeError(
            f"{folder} is a {kind}, which this export does not know.",
            hint=f"known are: {', '.join(CLASSES)}",
        )
    files, variant = _weights(folder, kind)
    own = read_json(folder / "config.json")
    return Part(name, kind, folder, {**_defaults(kind), **own}, files, variant)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; :class:`LatentEdgeError` when it is missing or damaged."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise LatentEdgeError(f"{path} is missing.", hint="copy or download the whole checkpoint folder") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise LatentEdgeError(f"{path} is damaged: {error}.", hint="copy or download it again") from error
    if not isinstance(data, dict):
        raise LatentEdgeError(f"{path} holds no JSON object.")
    return data


def component_class(kind: str) -> Any:
    """The class of a component."""
    module = library(CLASSES[kind])
    with quiet():  # both libraries import a class when it is first asked for
        return getattr(module, kind)


def library_class(name: str) -> Any:
    """A pipeline or scheduler class of diffusers."""
    module = library("diffusers")
    with quiet():
        found = getattr(module, name, None)
    if found is None:
        raise LatentEdgeError(f"diffusers {module.__version__} has no {name}.", hint="install a newer diffusers")
    return found


def _defaults(kind: str) -> dict[str, Any]:
    """What the class assumes for fields that a configuration leaves out."""
    if CLASSES[kind] != "diffusers":
        return dict(component_class(kind).config_class().to_dict())
    parameters = inspect.signature(component_class(kind).__init__).parameters.values()
    return {entry.name: entry.default for entry in parameters if entry.default is not inspect.Parameter.empty}


def _weights(folder: Path, kind: str) -> tuple[tuple[Path, ...], str | None]:
    """The weight files that a component's library takes of those that are there.

    diffusers puts the plain variant before others, pickles included; transformers puts safetensors before pickles.
    """
    if not folder.is_dir():
        raise LatentEdgeError(f"{folder} is missing.", hint="copy or download the whole checkpoint folder")
    found = weight_files(folder)
    if CLASSES[kind] != "diffusers":
        found = [path for path in found if path.suffix == found[0].suffix]
    if not found:
        raise LatentEdgeError(
            f"{folder} holds no weights.",
            hint="expected diffusion_pytorch_model.safetensors or model.safetensors there",
        )
    chosen = None if any(_variant(path) is None for path in found) else _variant(found[0])
    files = [path for path in found if _variant(path) == chosen]
    files = [path for path in files if path.suffix == files[0].suffix]
    whole = [path for path in files if not SHARD.search(path.name)]
    return tuple(whole or files), chosen


def weight_files(folder: Path) -> list[Path]:
    """Every file of torch weights of a component, safetensors first."""
    return [
        path
        for suffix in WEIGHT_SUFFIXES
        for path in sorted(folder.glob(f"*{suffix}"))
        if path.name.startswith(WEIGHT_NAMES) and "non_ema" not in path.name
    ]


def _variant(path: Path) -> str | None:
    """ "fp16" of ``model.fp16.safetensors`` and ``model.fp16-00001-of-00002.safetensors``."""
    middle = path.name.split(".")[1:-1]
    return middle[0].partition("-")[0] if middle else None


def load(part: Part) -> Any:
    """The component in float32 on the CPU, every key of it found; :class:`LatentEdgeError` lists those that are not."""
    torch = library("torch")
    options: dict[str, Any] = {"output_loading_info": True, "variant": part.variant}
    options["use_safetensors"] = part.files[0].suffix == ".safetensors"
    options["torch_dtype" if CLASSES[part.kind] == "diffusers" else "dtype"] = torch.float32
    try:
        with quiet():
            model, info = component_class(part.kind).from_pretrained(part.folder, **options)
    except READING_ERRORS as error:
        if "expected shape" in str(error):
            raise LatentEdgeError(
                f"the weights in {part.folder} do not fit its config.json: {first_sentence(error)}.",
                hint="config.json and weights must come from the same checkpoint",
            ) from error
        raise LatentEdgeError(
            f"{part.folder} cannot be loaded: {first_sentence(error)}.",
            hint="its config.json or its weights are damaged: copy or download both again",
        ) from error
    _check_keys(part, info)
    return model


def first_sentence(error: Exception) -> str:
    """What an error of the libraries says first; they go on at length."""
    lines = str(error).splitlines() or [type(error).__name__]
    return lines[0].partition(". ")[0].rstrip(".")


def _check_keys(part: Part, info: Mapping[str, Iterable[Any]]) -> None:
    problems = []
    for what in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        keys = sorted(str(key) for key in info.get(what, ()) if "position_ids" not in str(key))
        if keys:
            shown = ", ".join(keys[:LISTED_KEYS]) + (", ..." if len(keys) > LISTED_KEYS else "")
            problems.append(f"{len(keys)} {what.replace('_', ' ')}: {shown}")
    if problems:
        raise LatentEdgeError(
            f"the weights in {part.folder} do not fit its config.json; {'; '.join(problems)}.",
            hint="config.json and weights must come from the same checkpoint",
        )

"""CompVis layout: one checkpoint and its YAML, in a folder or as a file with ``--config``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentedge.runtime.errors import UsageError

if TYPE_CHECKING:
    from latentedge.export.model import SourceModel, SourceOptions

CHECKPOINT_SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth")
CONFIG_SUFFIXES = (".yaml", ".yml")


def matches(path: Path | str, options: SourceOptions) -> bool:
    """A folder with a YAML and no ``model_index.json``, or a file with a YAML of its name or ``--config``."""
    place = Path(path)
    if place.is_dir():
        configs = options.config is not None or any(_files(place, CONFIG_SUFFIXES))
        return configs and not (place / "model_index.json").exists()
    if place.suffix not in CHECKPOINT_SUFFIXES or not place.is_file():
        return False
    return options.config is not None or _config_beside(place) is not None


def load(path: Path | str, options: SourceOptions) -> SourceModel:
    """Read the model; errors name what is missing in the folder, in the YAML or in the weights."""
    from latentedge.export.sources.compvis_model import model_from_files

    place = Path(path)
    checkpoint = _only(place, CHECKPOINT_SUFFIXES, "checkpoint") if place.is_dir() else place
    config = options.config or (_only(place, CONFIG_SUFFIXES, "YAML") if place.is_dir() else _config_beside(place))
    if config is None or not config.is_file():
        raise UsageError(f"there is no YAML {config or 'for this checkpoint'}.", hint="name it with `--config FILE`.")
    return model_from_files(checkpoint, config, options)


def _files(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.suffix in suffixes and file.is_file())


def _config_beside(checkpoint: Path) -> Path | None:
    named: Any = (checkpoint.with_suffix(suffix) for suffix in CONFIG_SUFFIXES)
    return next((file for file in named if file.is_file()), None)


def _only(folder: Path, suffixes: tuple[str, ...], what: str) -> Path:
    found = _files(folder, suffixes)
    if len(found) != 1:
        names = ", ".join(file.name for file in found) or "none"
        named = "the file itself" if what == "checkpoint" else "the YAML with `--config FILE`"
        raise UsageError(
            f"{folder} must hold exactly one {what} ({', '.join(suffixes)}), found {names}.",
            hint=f"pass {named}." if found else f"put the {what} into the folder, or pass {named}.",
        )
    return found[0]

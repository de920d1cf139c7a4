"""Every network of the published zoo has exactly the keys, shapes and dtypes of its original."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
yaml = pytest.importorskip("yaml")

from latentedge.export.models.registry import build_network  # noqa: E402

ZOO = Path(__file__).parents[2] / "golden" / "zoo_keys"
CONFIGS: dict[str, Any] = yaml.safe_load((ZOO / "configs.yaml").read_text(encoding="utf-8"))
MODELS = sorted(file.name.removesuffix(".json.gz") for file in ZOO.glob("*.json.gz"))
PREFIXES = {
    "unet_config": "model.diffusion_model.",
    "first_stage_config": "first_stage_model.",
    "cond_stage_config": "cond_stage_model.",
}

Keys = dict[str, tuple[str, tuple[int, ...]]]


def recorded_keys(model: str) -> Keys:
    with gzip.open(ZOO / f"{model}.json.gz", "rt", encoding="utf-8") as stream:
        return {key: (dtype, tuple(shape)) for key, (dtype, shape) in json.load(stream).items()}


def keys_of(config: Any, prefix: str = "") -> Keys:
    """Keys of the network that ``config`` describes; strings and Identity describe none."""
    if isinstance(config, str) or config["target"] == "torch.nn.Identity":
        return {}
    with torch.device("meta"):
        state = build_network(config["target"], config.get("params", {})).state_dict()
    return {prefix + key: (str(value.dtype).removeprefix("torch."), tuple(value.shape)) for key, value in state.items()}


def test_each_recorded_model_has_a_configuration() -> None:
    assert len(MODELS) == 24
    assert set(MODELS) == set(CONFIGS)


@pytest.mark.parametrize("model", MODELS)
def test_keys_equal_the_original(model: str) -> None:
    recorded = recorded_keys(model)
    config = CONFIGS[model]["model"]
    if "unet_config" not in config["params"]:
        assert keys_of(config) == recorded
        return
    ours: Keys = {}
    for part, prefix in PREFIXES.items():
        ours |= keys_of(config["params"][part], prefix)
    if config["params"]["cond_stage_config"] == "__is_first_stage__":
        ours |= keys_of(config["params"]["first_stage_config"], "cond_stage_model.")
    networks = {key: value for key, value in recorded.items() if key.startswith(tuple(PREFIXES.values()))}
    assert ours == networks
    averaged = {
        key.removeprefix("model_ema."): value for key, value in recorded.items() if key.startswith("model_ema.")
    }
    if config["params"].get("use_ema", True):
        names = {
            key.removeprefix("model.").replace(".", ""): value for key, value in ours.items() if "model.diff" in key
        }
        assert averaged == {**names, "decay": ("float32", ()), "num_updates": ("int32", ())}
    else:
        assert averaged == {}

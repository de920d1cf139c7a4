"""The example of ``docs/adding-a-source.md`` runs as it stands there."""

from __future__ import annotations

import re
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from latentedge.export import sources
from latentedge.export.exporter import ExportOptions, export_source
from latentedge.export.model import SourceOptions
from latentedge.runtime.errors import LatentEdgeError
from latentedge.runtime.pipeline import Pipeline

PAGE = Path(__file__).parents[3] / "docs" / "adding-a-source.md"


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The page's code as a module, with its line in the registry."""
    page = PAGE.read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    (line,) = re.findall(r'^    ("linear": "latentedge\.export\.sources\.linear",)$', page, flags=re.MULTILINE)
    module = types.ModuleType("latentedge.export.sources.linear")
    exec(compile(code, str(PAGE), "exec"), module.__dict__)
    monkeypatch.setitem(__import__("sys").modules, module.__name__, module)
    name, place = re.findall(r'"([^"]+)"', line)
    monkeypatch.setattr(sources, "SOURCES", {name: place, **sources.SOURCES})


@pytest.mark.usefixtures("registered")
def test_the_example_exports(tmp_path: Path) -> None:
    torch.manual_seed(0)
    networks = {"vae_encoder": torch.nn.Conv2d(3, 4, 8, 8), "vae_decoder": torch.nn.ConvTranspose2d(4, 3, 8, 8)}
    state = {
        f"{name}.{key}": value for name, network in networks.items() for key, value in network.state_dict().items()
    }
    folder = tmp_path / "linear"
    folder.mkdir()
    (folder / "linear.json").write_text('{"channels": 4}')
    with pytest.raises(LatentEdgeError, match="is missing"):
        sources.load_source(folder, SourceOptions())
    save_file(state, folder / "weights.safetensors")
    model = sources.load_source(folder, SourceOptions())
    export_source(model, tmp_path / "linear.bundle", ExportOptions(precisions=("fp32", "fp16")))
    picture = np.random.default_rng(0).random((1, 32, 48, 3), np.float32)
    with Pipeline.open(tmp_path / "linear.bundle", backend="onnxruntime", precision="fp32") as pipe:
        found = pipe.reconstruct(picture).array
    with torch.no_grad():
        sample = torch.from_numpy(picture).permute(0, 3, 1, 2) * 2 - 1
        expected = networks["vae_decoder"](networks["vae_encoder"](sample)) / 2 + 0.5
    np.testing.assert_allclose(found, expected.clamp(0, 1).permute(0, 2, 3, 1).numpy(), atol=1e-5)


def test_what_is_missing_and_what_is_not_known_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(LatentEdgeError, match=r"there is no .*nothing\.ckpt\."):
        sources.load_source(tmp_path / "nothing.ckpt", SourceOptions())
    with pytest.raises(LatentEdgeError, match="is no checkpoint that latentedge reads; found an empty folder"):
        sources.load_source(tmp_path, SourceOptions())
    for number in range(12):
        (tmp_path / f"{number:02}.txt").write_text("")
    with pytest.raises(LatentEdgeError, match=r"found 00\.txt, .*, 09\.txt and 2 more\."):
        sources.load_source(tmp_path, SourceOptions())

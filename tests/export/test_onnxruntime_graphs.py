"""ONNX Runtime's own copies of the graphs: compared, measured, kept, and loaded only where everything matches."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

pytest.importorskip("onnxruntime")

from latentedge.export import onnxruntime_graphs
from latentedge.export.builders import BuildRequest
from latentedge.export.exporter import ExportOptions, export_source
from latentedge.export.latency import example_inputs
from latentedge.export.onnxruntime_graphs import optimise_bundle
from latentedge.runtime.bundle import Bundle
from latentedge.runtime.engines import EngineOptions, open_engine
from latentedge.runtime.engines import onnxruntime as backend
from latentedge.runtime.engines.plans import read_plans
from latentedge.runtime.errors import BundleError, ParityError
from tests.export.tiny import UNET, TinyDenoiser, component, tiny_model

LOW_MEMORY = EngineOptions(low_memory=True)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("graphs") / "tiny.bundle"
    export_source(tiny_model(component(UNET, TinyDenoiser)), path, ExportOptions())
    return path


@pytest.fixture(scope="module")
def built(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The bundle with its copies, and what was said of them."""
    path = tmp_path_factory.mktemp("built") / "tiny.bundle"
    shutil.copytree(exported, path)
    return path, optimised(Bundle.open(path))


@pytest.fixture
def bundle(built: tuple[Path, list[str]], tmp_path: Path) -> Bundle:
    shutil.copytree(built[0], tmp_path / "tiny.bundle")
    return Bundle.open(tmp_path / "tiny.bundle")


def denoiser_only(path: Path, folder: Path) -> Bundle:
    """The bundle without its other components, and without copies."""
    shutil.copytree(path, folder / "tiny.bundle")
    opened = Bundle.open(folder / "tiny.bundle")
    return dataclasses.replace(
        opened, manifest=dataclasses.replace(opened.manifest, components={"unet": opened.component("unet")})
    )


def optimised(bundle: Bundle) -> list[str]:
    lines: list[str] = []
    optimise_bundle(bundle, BuildRequest(bundle, "onnxruntime", notify=lines.append))
    return lines


def kept(bundle: Bundle, options: EngineOptions = LOW_MEMORY) -> Path | None:
    unet = bundle.component("unet")
    return backend.kept_graph(bundle, unet, "fp32", bundle.variant("unet", "fp32")[1], options)


def test_a_copy_is_kept_and_gives_what_the_graph_gives(
    exported: Path, built: tuple[Path, list[str]], bundle: Bundle
) -> None:
    unet = bundle.component("unet")
    inputs = example_inputs(unet, {name: axis.opt for name, axis in unet.axes.items()})
    outputs = []
    for opened in (Bundle.open(exported), bundle):
        with open_engine(opened, "unet", "onnxruntime", "fp32", EngineOptions(threads=1)) as engine:
            outputs.append(engine.run(inputs)["out_sample"])
    assert any(line.startswith("unet fp32: fused is ") for line in built[1])
    assert kept(bundle) is not None
    assert np.abs(outputs[0] - outputs[1]).max() < 1e-5 * np.abs(outputs[0]).max()
    assert {plan.key.component for plan in read_plans(bundle.path / "engines")} == set(bundle.manifest.components)


def test_the_session_reads_the_copy(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[tuple[Path, bool]] = []
    plain = backend.open_session

    def noting(path: Path, *arguments: object, optimise: bool = True) -> object:
        read.append((path, optimise))
        return plain(path, *arguments, optimise=optimise)  # type: ignore[arg-type]

    monkeypatch.setattr(backend, "open_session", noting)
    open_engine(bundle, "unet", "onnxruntime", "fp32", EngineOptions()).close()
    assert read == [(kept(bundle, EngineOptions()), False)]


@pytest.mark.parametrize("changed", ["weights", "library", "machine"])
def test_a_copy_of_something_else_is_not_loaded(bundle: Bundle, changed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert kept(bundle) is not None
    if changed == "library":
        monkeypatch.setattr(backend.onnxruntime, "__version__", "0.0")
    elif changed == "machine":
        monkeypatch.setattr(backend, "machine_fingerprint", lambda: "another")
    variant = bundle.variant("unet", "fp32")[1]
    variant = dataclasses.replace(variant, sha256="0" * 64) if changed == "weights" else variant
    assert backend.kept_graph(bundle, bundle.component("unet"), "fp32", variant, EngineOptions()) is None


@pytest.mark.parametrize("suffix", [".onnx", ".data"])
def test_a_damaged_copy_is_an_error(bundle: Bundle, suffix: str) -> None:
    path = kept(bundle, EngineOptions())
    assert path is not None
    victim = next(file for file in path.parent.iterdir() if file.name.endswith(suffix))
    victim.write_bytes(victim.read_bytes()[:-1])
    with pytest.raises(BundleError, match="is damaged"):
        open_engine(bundle, "unet", "onnxruntime", "fp32", EngineOptions())


def test_a_copy_that_computes_something_else_is_an_error(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(model: ir.Model) -> int:
        softmax = next(node for node in model.graph if node.op_type == "Softmax")
        softmax.attributes["axis"] = ir.AttrInt64("axis", 1)
        return 1

    monkeypatch.setattr(onnxruntime_graphs, "REWRITES", {"fused": broken})
    with pytest.raises(ParityError, match="fused for ONNX Runtime, does not give"):
        optimised(denoiser_only(exported, tmp_path))


@pytest.mark.parametrize(("ratio", "style"), [(1.2, "fused"), (0.9, "plain")])
def test_what_measures_faster_is_kept(
    exported: Path, tmp_path: Path, ratio: float, style: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnxruntime_graphs, "_ratios", lambda *arguments: np.full(8, ratio))
    monkeypatch.setattr(onnxruntime_graphs, "_peak", lambda path, *rest: 50 if path.parent.name == "sliced" else 100)
    opened = denoiser_only(exported, tmp_path)
    assert any("sliced is kept for --low-memory" in line for line in optimised(opened))
    for options, expected in ((EngineOptions(), style), (LOW_MEMORY, "sliced")):
        path = kept(opened, options)
        assert path is not None
        assert f'"style": "{expected}"' in (path.parent / "key.json").read_text(encoding="utf-8")

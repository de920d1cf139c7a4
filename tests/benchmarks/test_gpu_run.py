"""The run that needs a GPU, over ONNX Runtime and torch on the processor, so that a GPU finds no fault of its own."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

pytest.importorskip("onnxruntime")
pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from latentedge.benchmarks.gpu import run_all, stable_diffusion
from latentedge.benchmarks.gpu.report import Report
from latentedge.benchmarks.gpu.torch_peer import torch_runs
from latentedge.runtime import doctor
from latentedge.runtime.engines import EngineOptions
from latentedge.runtime.errors import MissingDependencyError

#: A UNet of a few thousand weights with Stable Diffusion 1.5's inputs.
SMALL = {
    "sample_size": 8,
    "block_out_channels": (32, 32),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": 768,
    "attention_head_dim": 4,
}


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("gpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_all, "conformance", lambda: ["1 passed"])
        patch.setattr(run_all, "write_checkpoint", partial(stable_diffusion.write_checkpoint, unet=SMALL))
        patch.setattr(run_all, "torch_runs", partial(eager_runs, device="cpu"))
        engines = {"onnxruntime": ("onnxruntime", EngineOptions(threads=1, hoisting=False))}
        patch.setattr(run_all, "ENGINES", {**engines, **run_all.ENGINES})
        source = stable_diffusion.write_checkpoint(folder / "work" / "stable-diffusion-1.5", SMALL)
        arguments = [str(source), "-o", str(folder / "gpu.json"), "--work", str(folder / "work")]
        result = CliRunner().invoke(run_all.main, arguments, catch_exceptions=False)
        content: dict[str, Any] = json.loads((folder / "gpu.json").read_text())
        assert result.exit_code == (1 if content["failed"] else 0)
    return content


def eager_runs(*arguments: Any, **options: Any) -> Any:
    """Compiling takes a minute on a processor, and is torch's own."""
    return {name: run for name, run in torch_runs(*arguments, **options).items() if "compile" not in name}


def test_what_runs_here_is_compared_and_timed(report: dict[str, Any]) -> None:
    parity = report["results"]["stable-diffusion-1.5: parity onnxruntime"]["result"]
    assert {name: value > 45 for name, value in parity.items()} == {
        f"{component} {precision}": True
        for component in ("unet", "vae_encoder", "vae_decoder", "text_encoder")
        for precision in ("fp32", "fp16")
    }
    found = report["results"]["stable-diffusion-1.5: latency"]["result"]
    assert found.pop("reference") == "onnxruntime fp32"
    assert list(found) == ["onnxruntime fp32", "onnxruntime fp16", "torch fp32", "torch fp16"]
    assert found["onnxruntime fp32"]["ratio"]["ratio"] == 1
    assert all(entry["p50"] > 0 for entry in found.values())


def test_what_is_not_here_is_no_failure(report: dict[str, Any]) -> None:
    if doctor.read_gpus()[1]:
        pytest.skip("there is a GPU")
    assert report["failed"] == {}
    for engine in ("onnxruntime cuda", "tensorrt", "tensorrt-rtx graph"):
        assert f"stable-diffusion-1.5: parity {engine}" in report["not here"]
        assert f"stable-diffusion-1.5: open {engine} fp16" in report["not here"]
    assert "no NVIDIA GPU is visible" in report["not here"]["stable-diffusion-1.5: build tensorrt"]


def test_a_step_that_fails_is_recorded_and_the_next_one_runs(tmp_path: Path) -> None:
    def fail() -> None:
        raise RuntimeError("no memory")

    def miss() -> None:
        raise MissingDependencyError("no library", hint="install it")

    report = Report(tmp_path / "reports" / "gpu.json")
    assert report.step("fails", fail) is None
    assert report.step("misses", miss) is None
    assert report.step("works", lambda: [1, 2], len) == [1, 2]
    written = json.loads((tmp_path / "reports/gpu.json").read_text())
    assert written["failed"]["fails"]["error"] == "RuntimeError: no memory"
    assert "fail()" in written["failed"]["fails"]["trace"] or "in fail" in written["failed"]["fails"]["trace"]
    assert written["not here"] == {"misses": "no library"}
    assert written["results"]["works"]["result"] == 2


def test_after_its_minutes_nothing_new_is_begun(tmp_path: Path) -> None:
    report = Report(tmp_path / "gpu.json", minutes=0)
    assert report.step("late", lambda: pytest.fail("it was begun")) is None
    assert json.loads((tmp_path / "gpu.json").read_text())["left out"] == ["late"]


def test_torch_without_a_gpu_says_so() -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(MissingDependencyError, match="no GPU"):
        torch_runs(None, {})  # type: ignore[arg-type]

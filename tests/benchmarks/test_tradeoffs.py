"""Combinations of memory and intervals of step caching are measured in processes of their own, and recorded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from latentedge.benchmarks import tradeoffs
from latentedge.benchmarks.tradeoffs import keep, ladder, measure_memory, measure_step_caching
from latentedge.runtime.bundle import Axis, Bundle, Component, Variant
from latentedge.runtime.engines.hoisted import SHALLOW, part_name
from latentedge.runtime.errors import EngineError, UsageError
from tests.tiny_bundles import manifest_of

SIDE = {name: Axis(4, 64, 128, multiple=4) for name in ("latent_height", "latent_width")}


class FakeProcess:
    """Stands in for a measured process: its memory and its time follow the settings that it was told to load."""

    def __init__(self, name: str) -> None:
        self.name = name

    def ask(self, do: str, **message: Any) -> dict[str, Any]:
        if do == "load":
            if message["precision"] == "bf16":
                raise EngineError("no bf16 here")
            self.options, self.request = message["options"], message["request"]
            return {"first_picture_seconds": 2.0 if self.options.get("low_memory") else 1.0}
        if do == "memory":
            return {"peak_rss": 100 - 40 * self.options["low_memory"] - self.request.get("tile", 0) // 8}
        interval = self.options.get("cache_interval", 1)
        if do == "save_picture":
            picture = np.full((1, 4, 4, 3), 0.5 + 0.01 * (interval - 1), np.float32)
            np.save(message["path"], picture)
            return {"path": message["path"]}
        return {"seconds": 1.0 / interval}

    def __enter__(self) -> FakeProcess:
        return self

    def __exit__(self, *_: object) -> None:
        pass


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bundle:
    monkeypatch.setattr(tradeoffs, "MeasuredProcess", FakeProcess)
    variants = {"fp32": Variant("unet/model.onnx", "0" * 64, 1)}
    parts = [Component("unet", (), (), {}, variants), Component("vae_decoder", (), (), dict(SIDE), variants)]
    return Bundle(tmp_path, manifest_of(*parts, Component(part_name("unet", SHALLOW), (), (), {}, variants)))


def test_the_ladder_goes_from_most_to_least_memory(bundle: Bundle) -> None:
    downscale = bundle.manifest.latent.downscale
    assert ladder(bundle.manifest, (64 * downscale, 32 * downscale)) == [
        (False, None), (True, None), (True, 32), (True, 16)
    ]  # fmt: skip
    assert ladder(bundle.manifest, (8 * downscale, 8 * downscale)) == [(False, None), (True, None)]


def test_every_combination_is_measured_and_a_missing_precision_is_said(bundle: Bundle) -> None:
    lines: list[str] = []
    downscale = bundle.manifest.latent.downscale
    request = {"height": 64 * downscale, "width": 64 * downscale}
    settings = [("onnxruntime", "bf16"), ("onnxruntime", "fp32")]
    rows = measure_memory(bundle, settings, request, {}, lines.append)
    assert [(row["low_memory"], row["tile"], row["peak_bytes"], row["seconds"]) for row in rows] == [
        (False, None, 100, 1.0), (True, None, 60, 2.0), (True, 32, 56, 2.0), (True, 16, 58, 2.0)
    ]  # fmt: skip
    assert lines[0] == "onnxruntime bf16 was not measured: no bf16 here"
    with pytest.raises(EngineError, match="no setting could be measured"):
        measure_memory(bundle, settings[:1], request, {}, lines.append)


def test_intervals_are_measured_against_every_step_in_full(bundle: Bundle) -> None:
    rows = measure_step_caching(bundle, [("onnxruntime", "fp32")], {}, {}, 3, lambda line: None)
    assert [row["interval"] for row in rows] == list(tradeoffs.INTERVALS)
    assert [row["ratio"] for row in rows] == pytest.approx(list(tradeoffs.INTERVALS))
    # A difference of 0.01 everywhere is 40 dB.
    assert rows[0]["psnr_worst_db"] == pytest.approx(40, abs=0.01)
    assert rows[1]["psnr_worst_db"] == pytest.approx(40 - 20 * np.log10(2), abs=0.01)


def test_without_its_graphs_step_caching_is_an_error(bundle: Bundle) -> None:
    del bundle.manifest.components[part_name("unet", SHALLOW)]
    with pytest.raises(UsageError, match="no graphs for step caching") as caught:
        measure_step_caching(bundle, [("onnxruntime", "fp32")], {}, {}, 3, lambda line: None)
    assert "--plan step-caching" in str(caught.value.hint)


def test_a_newer_record_replaces_only_its_own(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[Any] = []
    monkeypatch.setattr(tradeoffs.Bundle, "open", lambda path: written[-1] if written else bundle)
    monkeypatch.setattr(
        tradeoffs, "write_manifest", lambda path, manifest: written.append(Bundle(bundle.path, manifest))
    )
    rows = measure_step_caching(bundle, [("onnxruntime", "fp32")], {}, {}, 3, lambda line: None)
    keep(bundle, "step-caching", rows)
    keep(bundle, "step-caching", [{**rows[0], "ratio": 9.0}, {**rows[0], "backend": "onnxruntime:threads=1"}])
    records = written[-1].component("unet").variants["fp32"].measured
    assert sorted(record["interval"] for record in records) == list(tradeoffs.INTERVALS)
    assert [record["ratio"] for record in records if record["interval"] == 2] == [9.0]

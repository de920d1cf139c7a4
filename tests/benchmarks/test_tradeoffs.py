"""Combinations of memory and intervals of step caching are measured in processes of their own, and recorded."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from latentedge.benchmarks import tradeoffs
from latentedge.benchmarks.tradeoffs import guided, keep, ladder, measure_memory, measure_step_caching, ways
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
        if do == "sigmas":
            return {"sigmas": [8.0, 4.0, 2.0, 1.0]}
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
    found = measure_step_caching(bundle, [("onnxruntime", "fp32")], {"steps": 12}, {}, 3, lambda line: None)
    assert {row["steps"] for row in found} == {12}
    rows = [row for row in found if "interval" in row]
    assert [row["interval"] for row in rows] == list(tradeoffs.INTERVALS)
    assert [row["ratio"] for row in rows] == pytest.approx(list(tradeoffs.INTERVALS))
    # A difference of 0.01 everywhere is 40 dB.
    assert rows[0]["psnr_worst_db"] == pytest.approx(40, abs=0.01)
    assert rows[1]["psnr_worst_db"] == pytest.approx(40 - 20 * np.log10(2), abs=0.01)


@given(steps=st.integers(1, 100))
def test_lists_of_full_steps_begin_with_the_first_and_are_as_many_as_an_interval_computes(steps: int) -> None:
    counts = {len(range(0, steps, interval)) for interval in tradeoffs.INTERVALS}
    lists = [way["full"] for way in ways(steps) if "full" in way]
    uniform = [list(range(0, steps, interval)) for interval in tradeoffs.INTERVALS]
    assert len({tuple(full) for full in lists}) == len(lists)
    for full in lists:
        assert full[0] == 0
        assert full == sorted(set(full))
        assert full[-1] < steps
        assert len(full) in counts
        assert full not in uniform


def test_full_steps_crowd_at_either_end() -> None:
    lists = [way["full"] for way in ways(20) if "full" in way and len(way["full"]) == 4]
    assert lists == [[0, 9, 13, 17], [0, 2, 7, 13]]


def test_guidance_is_computed_anew_evenly_and_closer_at_the_end() -> None:
    found = [way["guidance_every"] for way in guided(20, [1.0] * 20) if "guidance_every" in way]
    assert found[:4] == list(tradeoffs.INTERVALS)
    assert [len(listed) for listed in found[4:]] == [10, 7, 4, 3]
    assert found[-2:] == [[0, 7, 11, 16], [0, 8, 14]]
    assert guided(20, []) == []
    assert [way.get("guidance_every") for way in guided(2, [2.0, 1.0])] == [None]


@pytest.mark.parametrize(("scale", "lows"), [(7.5, [2.0, 4.0]), (1.0, []), (None, [])])
def test_guidance_is_left_out_of_the_last_steps(bundle: Bundle, scale: float | None, lows: list[float]) -> None:
    defaults = dataclasses.replace(bundle.manifest.defaults, guidance_scale=scale)
    scaled = Bundle(bundle.path, dataclasses.replace(bundle.manifest, defaults=defaults))
    rows = measure_step_caching(scaled, [("onnxruntime", "fp32")], {}, {}, 3, lambda line: None)
    found = [row["guidance_interval"] for row in rows if "guidance_interval" in row]
    # Of the sigmas 8, 4, 2, 1 a quarter is the last one, a half the last two.
    assert found == [[low, tradeoffs.HIGHEST_SIGMA] for low in lows]


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
    assert len(records) == len(rows)
    assert sorted(record["interval"] for record in records if "interval" in record) == list(tradeoffs.INTERVALS)
    assert [record["ratio"] for record in records if record.get("interval") == 2] == [9.0]

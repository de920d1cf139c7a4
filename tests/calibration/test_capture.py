from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from latentedge.calibration import capture as whole
from latentedge.calibration.candidates import write_manifest
from latentedge.calibration.capture import CaptureSettings, capture, evaluations, open_observed, take_sample
from latentedge.calibration.observers import TensorStatistics, merge_all
from latentedge.calibration.records import pack, unpack
from latentedge.calibration.requests import requests
from latentedge.runtime.bundle import Bundle
from latentedge.runtime.errors import LatentEdgeError
from latentedge.runtime.pipeline import Pipeline


def settings_of(bundle: Bundle, samples: int = 3) -> CaptureSettings:
    return CaptureSettings(str(bundle.path), samples=samples, threads=1)


def as_bytes(statistics: dict[str, TensorStatistics]) -> bytes:
    return pack(dict(sorted(statistics.items())), [])


def test_observing_does_not_change_the_trajectory(bundle: Bundle) -> None:
    request = requests(bundle, 1, 6)[0]
    with Pipeline.open(bundle.path, "onnxruntime", "fp32") as pipeline:
        plain = [step.latents for step in pipeline.steps(**request)]
    _, probes = unpack(take_sample(settings_of(bundle), 0))
    assert len(probes) == 1
    number = probes[0].step
    assert number > 0
    with Pipeline.open(bundle.path, "onnxruntime", "fp32") as pipeline:
        engine = pipeline.engine("unet")
        np.testing.assert_allclose(engine.run(probes[0].inputs)["out_sample"], probes[0].output, atol=1e-5)
    np.testing.assert_allclose(probes[0].inputs["sample"], plain[number - 1], atol=1e-4)


def test_every_step_of_the_trajectory_is_observed(bundle: Bundle) -> None:
    statistics, probes = capture(settings_of(bundle, samples=6), bundle.path / "calibration")
    entry = statistics["mid.0.attn.0.norm_output"]
    assert len(entry.amax) == 6
    assert len({probe.step for probe in probes}) >= 4
    assert "mid.0.attn.0_output" in statistics
    assert "conv_in_output" in statistics


def test_sharded_statistics_equal_one_run(bundle: Bundle) -> None:
    settings = settings_of(bundle, samples=4)
    whole, _ = capture(settings, bundle.path / "one")
    parts = [unpack(take_sample(settings, index))[0] for index in (3, 1, 0, 2)]
    assert as_bytes(merge_all(parts)) == as_bytes(whole)


def test_probes_reach_the_end_of_a_sampler_that_evaluates_twice(bundle: Bundle) -> None:
    defaults = dataclasses.replace(bundle.manifest.defaults, sampler="heun")
    twice = Bundle(bundle.path, dataclasses.replace(bundle.manifest, defaults=defaults))
    assert (evaluations(bundle, 6), evaluations(twice, 6)) == (6, 11)
    write_manifest(twice)
    _, probes = capture(settings_of(twice, samples=8), bundle.path / "calibration")
    assert len(probes) == 8
    assert {probe.step // 4 for probe in probes} == {0, 1, 2}


def test_a_trajectory_that_ends_before_the_probe_keeps_its_last_evaluation(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(whole, "evaluations", lambda bundle, steps: 60)
    _, probes = unpack(take_sample(settings_of(bundle), 0))
    assert [probe.step for probe in probes] == [5]


RUN = """
import sys
from pathlib import Path
from latentedge.calibration.capture import CaptureSettings, capture
capture(CaptureSettings(sys.argv[1], samples=40, threads=1), Path(sys.argv[1]) / "calibration" / "samples",
        progress=lambda done, total: print(done, flush=True))
"""


def test_killed_in_the_middle_it_goes_on_where_it_was(bundle: Bundle) -> None:
    process = subprocess.Popen([sys.executable, "-c", RUN, str(bundle.path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    reported = [int(process.stdout.readline()) for _ in range(3)][-1]
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    folder = bundle.path / "calibration" / "samples"
    kept = sorted(folder.glob("*/sample-*.npz"))
    assert len(kept) >= reported == 3
    times = {file: file.stat().st_mtime_ns for file in kept[:3]}
    time.sleep(0.01)
    settings = settings_of(bundle, samples=4)
    resumed, _ = capture(settings, folder)
    assert {file: file.stat().st_mtime_ns for file in times} == times
    fresh, _ = capture(settings, bundle.path / "fresh")
    assert as_bytes(resumed) == as_bytes(fresh)


def test_other_settings_do_not_use_the_checkpoints(bundle: Bundle) -> None:
    settings = settings_of(bundle, samples=1)
    capture(settings, bundle.path / "c")
    other = dataclasses.replace(settings, steps=3)
    assert other.digest() != settings.digest()
    assert dataclasses.replace(settings, samples=9).digest() == settings.digest()
    capture(other, bundle.path / "c")
    assert [path.name for path in (bundle.path / "c").iterdir()] == [other.digest()[:16]]


def test_a_damaged_checkpoint_is_named(bundle: Bundle) -> None:
    settings = settings_of(bundle, samples=1)
    capture(settings, bundle.path / "c")
    (file,) = (bundle.path / "c").glob("*/sample-00000.npz")
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(LatentEdgeError, match="sample-00000"):
        capture(settings, bundle.path / "c")


def test_memory_does_not_grow_with_samples(bundle: Bundle) -> None:
    engine = open_observed(bundle, "unet", outputs=False, threads=1)
    sizes = []
    for number in range(3):
        engine.begin(number, lambda index: True, lambda index: False)
        sample = np.random.default_rng(number).standard_normal((1, 4, 8, 8)).astype(np.float32)
        for _ in range(number * 3 + 1):
            engine.run({"sample": sample, "timestep": np.array([500.0], np.float32)})
        sizes.append(
            sum(e.counts.nbytes + e.channel_amax.nbytes + e.channel_squares.nbytes for e in engine.statistics.values())
        )
    assert sizes[0] == sizes[1] == sizes[2]
    assert not list(bundle.path.rglob(".*observed*"))


def test_held_out_requests_are_others(bundle: Bundle) -> None:
    seeds = {request["seed"] for request in requests(bundle, 50, None)}
    assert not seeds & {request["seed"] for request in requests(bundle, 50, None, held_out=True)}

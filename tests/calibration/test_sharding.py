from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from latentedge.calibration import calibrate as whole
from latentedge.calibration.calibrate import Options, Reporter, calibrate
from latentedge.calibration.capture import CaptureSettings, capture
from latentedge.calibration.plan import Plan
from latentedge.calibration.presentation import least
from latentedge.calibration.records import pack
from latentedge.calibration.sharding import Mapper, mapper_of, on_ray
from latentedge.runtime.bundle import Bundle
from latentedge.runtime.errors import EngineError, MissingDependencyError, UsageError
from tests.calibration.graphs import write_bundle


def in_random_order(
    function: Callable[[Any, int], Any], settings: Any, indexes: list[int]
) -> Iterator[tuple[int, Any]]:
    """The order in which a cluster may finish."""
    shuffled = random.Random(5).sample(indexes, len(indexes))
    for index in shuffled:
        yield index, function(settings, index)


def errors_by_block(folder: Path, mapper: Mapper, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """SQNR and PSNR of each block alone; gains are left out, because no two measurements are the same."""
    bundle = write_bundle(folder)
    monkeypatch.setattr(whole, "target_of", lambda options: dataclasses.replace(untimed, threads=1))
    untimed = whole.Target("onnxruntime", "int8", "fp32", timed=False)
    calibrate(bundle.path, Options(samples=3, pictures=2, backend="onnxruntime", threads=1), Reporter(), mapper)
    plan = Plan.load(bundle.path / "calibration" / "plan.json")
    assert not (bundle.path / "calibration" / "sensitivity").exists()
    return {block.name: (block.sqnr_db, block.psnr_db, block.precision) for block in plan.blocks}


def test_the_order_of_the_results_does_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = errors_by_block(tmp_path / "one", mapper_of(None), monkeypatch)
    other = errors_by_block(tmp_path / "two", in_random_order, monkeypatch)
    assert one == other
    assert all(sqnr is not None and psnr is not None for sqnr, psnr, _ in one.values())


@pytest.mark.slow
def test_a_ray_cluster_measures_the_same_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray")
    one = errors_by_block(tmp_path / "one", mapper_of(None), monkeypatch)
    assert errors_by_block(tmp_path / "two", on_ray("local"), monkeypatch) == one


@pytest.mark.slow
def test_a_ray_cluster_gives_the_same_statistics(bundle: Bundle) -> None:
    pytest.importorskip("ray")
    settings = CaptureSettings(str(bundle.path), samples=4, threads=1)
    alone, _ = capture(settings, bundle.path / "one")
    sharded, _ = capture(settings, bundle.path / "two", on_ray("local"))
    assert pack(dict(sorted(sharded.items())), []) == pack(dict(sorted(alone.items())), [])


def refusing(settings: str, index: int) -> None:
    raise UsageError(f"{settings} {index} is wrong.", hint="another one")


@pytest.mark.slow
def test_an_error_on_a_node_is_the_error_that_the_caller_sees() -> None:
    pytest.importorskip("ray")
    with pytest.raises(UsageError, match="sample 3 is wrong") as error:
        list(on_ray("local")(refusing, "sample", [3]))
    assert error.value.hint == "another one"


@pytest.mark.slow
def test_a_cluster_that_is_not_there() -> None:
    pytest.importorskip("ray")
    with pytest.raises(EngineError, match="no Ray cluster at"):
        list(on_ray("127.0.0.1:1")(refusing, "sample", [3]))


def test_blocks_that_are_known_are_not_measured_again(
    tmp_path: Path, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that ends after two blocks, as a killed one does, and the next one."""
    measured: list[int] = []

    def counting(function: Callable[[Any, int], Any], settings: Any, indexes: list[int]) -> Iterator[tuple[int, Any]]:
        for index in indexes:
            if function.__name__ == "block_error":
                if len(measured) == 2:
                    raise KeyboardInterrupt
                measured.append(index)
            yield index, function(settings, index)

    untimed = whole.Target("onnxruntime", "int8", "fp32", 1, timed=False)
    monkeypatch.setattr(whole, "target_of", lambda options: untimed)
    options = Options(samples=2, pictures=2, backend="onnxruntime", threads=1)
    with pytest.raises(KeyboardInterrupt):
        calibrate(bundle.path, options, Reporter(), counting)
    files = sorted((bundle.path / "calibration" / "sensitivity").glob("*/block-*.json"))
    assert len(files) == 2
    for file in files:
        by_timestep, sqnr_db, psnr_db = json.loads(file.read_text())
        assert [timestep for timestep, _ in by_timestep] == sorted({timestep for timestep, _ in by_timestep})
        assert len(by_timestep) == 2, "two samples, one probe each"
        assert sqnr_db == pytest.approx(sum(decibels for _, decibels in by_timestep) / 2)
        assert psnr_db > 10
    first, measured[:] = list(measured), []

    def rest(function: Callable[[Any, int], Any], settings: Any, indexes: list[int]) -> Iterator[tuple[int, Any]]:
        for index in indexes:
            measured.extend([index] if function.__name__ == "block_error" else [])
            yield index, function(settings, index)

    plan = calibrate(bundle.path, options, Reporter(), rest).plan
    assert measured
    assert not set(measured) & set(first)
    assert all(len(block.sqnr_db_by_timestep) == 2 for block in plan.blocks)
    assert Plan.load(bundle.path / "calibration" / "plan.json").blocks == plan.blocks
    timestep, decibels = min(plan.blocks[0].sqnr_db_by_timestep, key=lambda pair: pair[1])
    assert least(plan.blocks[0]) == f"{decibels:.1f} at {timestep:g}"


def test_ray_missing_is_an_error_that_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingDependencyError, match="ray") as error:
        mapper_of("local")
    assert "latentedge[ray]" in str(error.value)

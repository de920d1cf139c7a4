from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from latentedge.calibration.observers import (
    BINS,
    FIRST_NOT_FINITE,
    LARGEST_HALF,
    TensorStatistics,
    bin_values,
    merge_all,
)
from latentedge.calibration.ranges import LEVELS, OBSERVERS, mean_squared_error, scale_of
from latentedge.runtime.errors import LatentEdgeError

ANY = st.floats(width=32, allow_nan=True, allow_infinity=True)
TENSORS = arrays(np.float32, (2, 3, 5), elements=ANY)


def seen(*tensors: np.ndarray, step: float = 500.0) -> TensorStatistics:
    statistics = TensorStatistics.empty(3)
    for tensor in tensors:
        statistics.observe(tensor, 1, step)
    return statistics


def same(a: TensorStatistics, b: TensorStatistics) -> bool:
    return (
        np.array_equal(a.counts, b.counts)
        and np.array_equal(a.channel_amax, b.channel_amax)
        and np.array_equal(a.channel_squares, b.channel_squares)
        and (a.values, a.amax, a.not_finite) == (b.values, b.amax, b.not_finite)
    )


@settings(max_examples=60, deadline=None)
@given(st.lists(TENSORS, min_size=2, max_size=5), st.randoms())
def test_merging_shards_in_any_order_is_exactly_one_run(tensors: list[np.ndarray], random: object) -> None:
    whole = seen(*tensors)
    parts = [{"x": seen(tensor)} for tensor in tensors]
    random.shuffle(parts)  # type: ignore[attr-defined]
    assert same(merge_all(parts)["x"], whole)


def test_merging_is_associative_where_adding_floats_is_not() -> None:
    tensors = [np.full((1, 3, 1), value, np.float32) for value in (1e4, 1e-3, 3e3, 1e-2)]
    groups = [seen(tensor) for tensor in tensors]
    results = [a.merge(b).merge(c).merge(d) for a, b, c, d in itertools.permutations(groups)]
    assert all(same(result, results[0]) for result in results)


@settings(max_examples=100, deadline=None)
@given(TENSORS)
def test_no_rule_gives_a_scale_that_is_zero_or_infinite(tensor: np.ndarray) -> None:
    statistics = seen(tensor)
    for rule in OBSERVERS.values():
        amax = rule(statistics)
        assert 0 <= amax <= statistics.largest
        for dtype in (np.float32, np.float16):
            scale = dtype(scale_of(amax, np.dtype(dtype)))
            assert np.isfinite(scale)
            assert scale >= np.finfo(dtype).tiny


@pytest.mark.parametrize("amax", [float("nan"), float("inf"), -1.0])
def test_a_range_that_is_no_range_is_refused(amax: float) -> None:
    with pytest.raises(ValueError, match="finite"):
        scale_of(amax)


def test_faults_name_tensor_and_timestep() -> None:
    broken = np.ones((2, 3, 5), np.float32)
    broken[0, 1, 2] = np.nan
    statistics = seen(np.ones_like(broken))
    statistics.observe(broken, 1, 981.0)
    (fault,) = statistics.faults("mid.conv")
    assert (fault.tensor, fault.kind, fault.timestep) == ("mid.conv", "not finite", 981.0)
    assert "mid.conv at timestep 981: 1 values are NaN" in str(fault)
    assert [f.kind for f in seen(np.full((1, 3, 4), 2 * LARGEST_HALF, np.float32)).faults("x")] == ["huge"]
    assert [f.kind for f in seen(np.zeros((1, 3, 4), np.float32)).faults("x")] == ["zero"]
    assert seen(np.ones((1, 3, 4), np.float32)).faults("x") == []


def test_a_nan_does_not_hide_the_finite_maximum() -> None:
    tensor = np.array([[[1.0, np.nan], [-7.0, np.inf], [0.5, 0.25]]], np.float32)
    statistics = seen(tensor)
    assert statistics.largest == 7.0
    assert statistics.not_finite == {500.0: 2}
    assert statistics.counts[FIRST_NOT_FINITE:].sum() == 2


def test_bins_hold_every_magnitude_within_their_width() -> None:
    magnitudes = np.geomspace(1e-37, 3e38, 5000).astype(np.float32)
    index = (magnitudes.view(np.uint32)) >> 17
    assert index.max() < FIRST_NOT_FINITE < BINS
    np.testing.assert_allclose(bin_values()[index], magnitudes, rtol=1 / 64)


def test_expected_error_is_the_measured_error() -> None:
    data = np.random.default_rng(0).standard_normal((3, 40000)).astype(np.float32)
    statistics = TensorStatistics.empty(3)
    statistics.observe(data, 0, 1.0)
    counts, values = statistics.counts[:FIRST_NOT_FINITE], bin_values()
    for amax in (2.0, 3.0, 4.0, 6.0):
        step = amax / LEVELS
        quantised = np.clip(np.rint(data / step), -LEVELS, LEVELS) * step
        measured = float(np.mean(np.square(quantised - data, dtype=np.float64)))
        expected = mean_squared_error(counts, values, amax) / data.size
        assert abs(expected / measured - 1) < 0.05


def test_mse_rule_beats_the_maximum_on_heavy_tails() -> None:
    data = np.random.default_rng(1).standard_t(3, (3, 30000)).astype(np.float32)
    statistics = TensorStatistics.empty(3)
    statistics.observe(data, 0, 1.0)

    def error(amax: float) -> float:
        step = amax / LEVELS
        return float(np.mean((np.clip(np.rint(data / step), -LEVELS, LEVELS) * step - data) ** 2))

    assert error(OBSERVERS["mse"](statistics)) < 0.75 * error(OBSERVERS["absmax"](statistics))


def test_percentile_leaves_the_fraction_out() -> None:
    data = np.ones((3, 100000), np.float32)
    data[0, :3] = 1000.0
    statistics = TensorStatistics.empty(3)
    statistics.observe(data, 0, 1.0)
    assert OBSERVERS["percentile"](statistics) == pytest.approx(1.0, rel=1 / 64)
    assert OBSERVERS["absmax"](statistics) == 1000.0


def test_different_widths_are_not_merged() -> None:
    with pytest.raises(LatentEdgeError, match="3 and 4 channels"):
        TensorStatistics.empty(3).merge(TensorStatistics.empty(4))

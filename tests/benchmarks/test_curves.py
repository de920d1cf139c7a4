"""A curve's exponents are those of its points."""

from __future__ import annotations

import pytest

from latentedge.benchmarks.curves import lengths_from, summary
from latentedge.runtime.errors import UsageError


def rows(power: float) -> list[dict[str, float]]:
    return [
        {"value": side, "seconds": 3e-4 * side**power, "operations": 5 * side**2, "peak_bytes": 1e8 + 40 * side**2}
        for side in (32, 64, 128)
    ]


@pytest.mark.parametrize("power", [1.5, 2.2])
def test_exponents_and_bytes_are_found(power: float) -> None:
    found = summary("side", rows(power))
    assert found["exponent"] == pytest.approx(power)
    assert found["expected"] == pytest.approx(2)
    assert found["bytes_each"] == pytest.approx(40_000)


@pytest.mark.parametrize("text", ["", "4", "1,x", "0,1"])
def test_too_few_lengths_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="two or more lengths"):
        lengths_from(text)
    assert lengths_from("4,1,2") == [1, 2, 4]

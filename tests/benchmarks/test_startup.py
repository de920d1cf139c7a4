"""Programs are measured from start to end, and in turns."""

from __future__ import annotations

import sys

import pytest

from latentedge.benchmarks.startup import measure, start
from latentedge.runtime.errors import EngineError


def test_a_program_that_sleeps_and_one_that_computes() -> None:
    slept = start([sys.executable, "-c", "import time; time.sleep(0.3)"])
    assert slept["seconds"] >= 0.3
    assert slept["processor_seconds"] < slept["seconds"]
    held = start([sys.executable, "-c", "x = bytearray(200 << 20)"])
    assert held["peak_rss"] > 200 << 20
    assert slept["peak_rss"] < 40 << 20


def test_a_program_that_fails_is_an_error() -> None:
    with pytest.raises(EngineError, match="no such thing"):
        start([sys.executable, "-c", "raise SystemExit('no such thing')"])


def test_the_share_is_of_the_other_program() -> None:
    pair = ([sys.executable, "-c", "pass"], [sys.executable, "-c", "import time; time.sleep(1.5)"])
    found = measure({"sleep": pair}, 2)["sleep"]
    assert found["seconds"]["own"] < found["seconds"]["diffusers"]
    assert found["seconds"]["share"] < 0.7

"""What --memory-limit and --auto-quality choose follows records of this machine, and nothing else."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from latentedge.runtime import engines, tradeoffs
from latentedge.runtime.bundle import Bundle, Component, Variant
from latentedge.runtime.engines.base import EngineOptions
from latentedge.runtime.errors import EngineError, UsageError
from latentedge.runtime.machine import machine_fingerprint
from latentedge.runtime.selection import library_version
from latentedge.runtime.tradeoffs import Wishes, fitting, reuse, settle
from tests.tiny_bundles import manifest_of

GIB = 2**30
SIZE = (512, 512)

#: What would be measured: less memory takes longer, and int8 is small but was never compared.
LADDER = [
    ("fp32", False, None, 5.0, 1.0),
    ("fp32", True, None, 3.0, 2.0),
    ("fp32", True, 32, 2.0, 4.0),
    ("int8", True, 32, 1.0, 3.0),
]


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """A library that stands in for the engine library, so that the choice does not depend on what is installed."""
    monkeypatch.setattr(engines, "BACKENDS", {"onnxruntime": engines.Backend("none", "numpy", "cpu")})


def memory(precision: str, low: bool, tile: int | None, gib: float, seconds: float, **changed: Any) -> dict[str, Any]:
    record = {
        "kind": "memory", "backend": "onnxruntime", "precision": precision, "machine": machine_fingerprint(),
        "library": library_version("onnxruntime"), "low_memory": low, "tile": tile, "height": SIZE[0],
        "width": SIZE[1], "peak_bytes": int(gib * GIB), "seconds": seconds,
    }  # fmt: skip
    return {**record, **changed}


def caching(interval: int, ratio: float, worst: float, **changed: Any) -> dict[str, Any]:
    record = {
        "kind": "step-caching", "backend": "onnxruntime", "precision": "fp32", "machine": machine_fingerprint(),
        "library": library_version("onnxruntime"), "interval": interval, "ratio": ratio, "ratio_low": ratio - 0.1,
        "psnr_worst_db": worst, "steps": 20,
    }  # fmt: skip
    return {**record, **changed}


def bundle(*records: dict[str, Any]) -> Bundle:
    names = sorted({"fp32", *(str(record["precision"]) for record in records)})
    variants = {
        name: Variant(
            f"unet/model.{name}.onnx", "0" * 64, 1,
            measured=tuple(record for record in records if record["precision"] == name),
        )
        for name in names
    }  # fmt: skip
    return Bundle(Path("b.bundle"), manifest_of(Component("unet", (), (), {}, variants)))


def all_measured(**changed: Any) -> Bundle:
    return bundle(*(memory(*entry, **changed) for entry in LADDER))


@pytest.mark.parametrize(
    ("gib", "low_memory", "tile"), [(8, False, None), (5.2, False, None), (5.1, True, None), (2.5, True, 32)]
)
def test_the_fastest_that_fits_is_chosen(gib: float, low_memory: bool, tile: int | None) -> None:
    found = fitting(all_measured(), "auto", "auto", int(gib * GIB), SIZE)
    assert (found.precision, found.low_memory, found.tile) == ("fp32", low_memory, tile)


def test_what_it_costs_is_said() -> None:
    reason = fitting(all_measured(), "auto", "auto", 4 * GIB, SIZE).reason
    assert re.search(r"3\.00 GiB and 2\.00 s .*without a limit onnxruntime fp32: 5\.00 GiB and 1\.00 s", reason)


def test_nothing_fits_names_the_least() -> None:
    with pytest.raises(EngineError, match=r"draws 512x512 in 512 MiB: the least is 2\.00 GiB .*tiles of 32"):
        fitting(all_measured(), "auto", "auto", GIB // 2, SIZE)


def test_a_precision_that_was_not_compared_is_not_chosen_unless_named() -> None:
    with pytest.raises(EngineError, match=r"the least is 2\.00 GiB"):
        fitting(all_measured(), "auto", "auto", int(1.5 * GIB), SIZE)
    found = fitting(all_measured(), "auto", "int8", int(1.5 * GIB), SIZE)
    assert (found.precision, found.tile) == ("int8", 32)


@pytest.mark.parametrize("changed", [{"machine": "another"}, {"library": "onnxruntime 0.0"}, {"height": 256}])
def test_records_of_something_else_do_not_count(changed: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="no peak of memory was measured on this machine for 512x512") as caught:
        fitting(all_measured(**changed), "auto", "auto", 8 * GIB, SIZE)
    assert "--memory --record" in str(caught.value.hint)


def test_the_nearest_larger_size_is_taken() -> None:
    found = bundle(memory("fp32", False, None, 9.0, 9.0, height=1024, width=1024), memory("fp32", True, None, 3.0, 2.0))
    assert fitting(found, "auto", "auto", 4 * GIB, (256, 512)).low_memory


ASKED: list[dict[str, Any]] = [{"steps": 20}]


def test_the_fastest_interval_above_the_floor_is_chosen() -> None:
    found = bundle(caching(2, 1.5, 40.0), caching(3, 1.9, 34.0), caching(5, 2.5, 28.0))
    chosen = [reuse(found, "onnxruntime", "fp32", floor, ASKED)[0].get("interval") for floor in (45, 36, 30, 20)]
    assert chosen == [None, 2, 3, 5]


def test_an_interval_within_noise_is_not_chosen() -> None:
    found = bundle(caching(2, 1.05, 40.0))
    record, reason = reuse(found, "onnxruntime", "fp32", 30, ASKED)
    assert record == {}
    assert "nothing is faster and at 30 dB or better; the best of 1 measured is one step of 2 in full" in reason


@pytest.mark.parametrize(
    ("changed", "requests"),
    [
        ({"machine": "another"}, [{"steps": 20}]),
        ({}, [{"steps": 10}]),
        ({}, [{"steps": 20, "sampler": "euler"}]),
        ({}, [{"steps": 20, "guidance_scale": 12.0}]),
        ({"full": [0, 7]}, [{"steps": 30}]),
        ({"guidance_every": [0, 7]}, [{"steps": 30}]),
    ],
)
def test_what_was_measured_of_something_else_is_an_error(
    changed: dict[str, Any], requests: list[dict[str, Any]]
) -> None:
    with pytest.raises(UsageError, match="was not measured on this machine") as caught:
        reuse(bundle(caching(2, 1.5, 40.0, **changed)), "onnxruntime", "fp32", 30, requests)
    assert "--plan step-caching" in str(caught.value.hint)


def test_more_steps_than_were_measured_lie_closer_and_may_follow() -> None:
    found = bundle(caching(2, 1.5, 40.0))
    assert reuse(found, "onnxruntime", "fp32", 30, [{"steps": 50}])[0]["interval"] == 2


@pytest.mark.parametrize(
    ("changed", "options", "requests", "words"),
    [
        (
            {"full": [0, 2, 7, 13]},
            EngineOptions(cache_full=(0, 2, 7, 13)),
            [{"steps": 20}],
            "0, 2, 7, 13 of 20 in full",
        ),
        (
            {"guidance_interval": [0.5, 1e9]},
            EngineOptions(),
            [{"steps": 20, "guidance_interval": [0.5, 1e9]}],
            "guidance at sigmas from 0.5 on",
        ),
        (
            {"guidance_every": 3},
            EngineOptions(),
            [{"steps": 20, "guidance_every": 3}],
            "guidance anew in one step of 3",
        ),
        (
            {"guidance_every": [0, 5, 11]},
            EngineOptions(),
            [{"steps": 20, "guidance_every": [0, 5, 11]}],
            "guidance anew in steps 0, 5, 11",
        ),
    ],
)
def test_lists_of_full_steps_and_intervals_of_guidance_are_chosen_too(
    monkeypatch: pytest.MonkeyPatch, changed: dict[str, Any], options: EngineOptions, requests: list[Any], words: str
) -> None:
    faster = {name: value for name, value in caching(0, 3.0, 35.0, **changed).items() if name != "interval"}
    monkeypatch.setattr(tradeoffs.Bundle, "open", lambda path: bundle(caching(2, 1.5, 40.0), faster))
    asked: list[dict[str, Any]] = [{"steps": 20}]
    lines: list[str] = []
    _, chosen = settle(Path("b"), ("onnxruntime", "fp32"), EngineOptions(), Wishes(None, 30.0), asked, lines.append)
    assert (chosen, asked) == (options, requests)
    assert words in lines[0]


def settled(
    monkeypatch: pytest.MonkeyPatch, found: Bundle, wishes: Wishes, options: EngineOptions, request: dict[str, Any]
) -> tuple[tuple[str, str], EngineOptions, list[str]]:
    monkeypatch.setattr(tradeoffs.Bundle, "open", lambda path: found)
    lines: list[str] = []
    setting, chosen = settle(found.path, ("auto", "auto"), options, wishes, [request], lines.append)
    return setting, chosen, lines


def test_both_wishes_are_granted_together(monkeypatch: pytest.MonkeyPatch) -> None:
    found = bundle(*(memory(*entry) for entry in LADDER), caching(3, 1.9, 34.0))
    request: dict[str, Any] = {"height": 512, "width": 512, "steps": 20}
    setting, options, lines = settled(monkeypatch, found, Wishes(int(2.5 * GIB), 30.0), EngineOptions(), request)
    assert setting == ("onnxruntime", "fp32")
    assert (options.low_memory, options.cache_interval, request["tile"]) == (True, 3, 32)
    assert [line.split(":")[0] for line in lines] == ["measured here", "auto-quality"]


@pytest.mark.parametrize(
    ("options", "request_", "wishes"),
    [
        (EngineOptions(low_memory=True), {}, Wishes(memory_limit=GIB)),
        (EngineOptions(), {"tile": 16}, Wishes(memory_limit=GIB)),
        (EngineOptions(cache_interval=2), {}, Wishes(auto_quality=30)),
        (EngineOptions(cache_full=(0, 2)), {}, Wishes(auto_quality=30)),
        (EngineOptions(), {"guidance_interval": [0.3, 5]}, Wishes(auto_quality=30)),
        (EngineOptions(), {"guidance_every": 2}, Wishes(auto_quality=30)),
    ],
)
def test_a_choice_by_hand_and_a_wish_exclude_each_other(
    monkeypatch: pytest.MonkeyPatch, options: EngineOptions, request_: dict[str, Any], wishes: Wishes
) -> None:
    with pytest.raises(UsageError, match="itself; leave"):
        settled(monkeypatch, all_measured(), wishes, options, request_)


def test_without_wishes_nothing_is_read() -> None:
    assert settle(Path("nowhere"), ("auto", "fp32"), EngineOptions(), Wishes(), [], print) == (
        ("auto", "fp32"),
        EngineOptions(),
    )

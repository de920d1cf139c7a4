"""The choice of backend and precision follows records of this machine, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from latentedge.runtime import engines
from latentedge.runtime.bundle import Bundle, Component, Variant, graph_precision
from latentedge.runtime.errors import MissingDependencyError, UsageError
from latentedge.runtime.machine import machine_fingerprint
from latentedge.runtime.selection import choose, component_precision, library_version
from tests.tiny_bundles import manifest_of

#: Libraries that stand in for the engine libraries, so that the choice does not depend on what is installed.
STAND_IN = {"onnxruntime": "numpy", "openvino": "click"}


@pytest.fixture(autouse=True)
def two_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {
        name: engines.Backend(engines.BACKENDS[name].module, requires, "cpu") for name, requires in STAND_IN.items()
    }
    monkeypatch.setattr(engines, "BACKENDS", found)


def latency(backend: str, precision: str, ratio: float, low: float, **changed: Any) -> dict[str, Any]:
    record = {
        "kind": "latency",
        "backend": backend,
        "precision": precision,
        "machine": machine_fingerprint(),
        "library": library_version(backend),
        "seconds": 1 / ratio,
        "reference": "onnxruntime fp32",
        "ratio": ratio,
        "ratio_low": low,
    }
    return {**record, **changed}


def quality(precision: str, worst: float, floor: float = 30.0) -> dict[str, Any]:
    return {"kind": "quality", "precision": precision, "psnr_db": worst + 3, "psnr_worst_db": worst, "floor_db": floor}


def bundle(**measured: list[dict[str, Any]]) -> Bundle:
    variants = {
        name: Variant(f"unet/model.{name}.onnx", "0" * 64, 1, measured=tuple(records))
        for name, records in measured.items()
    }
    unet = Component("unet", (), (), {}, variants)
    return Bundle(Path("b.bundle"), manifest_of(unet))


def chosen(found: Bundle, backend: str = "auto", precision: str = "auto") -> tuple[str, str]:
    choice = choose(found, backend, precision)
    return choice.backend, choice.precision


def test_without_records_fp32_runs_on_onnxruntime() -> None:
    assert chosen(bundle(fp32=[], int8=[])) == ("onnxruntime", "fp32")


def test_the_fastest_record_above_the_floor_wins() -> None:
    records = [latency("openvino", "fp32", 1.3, 1.2), latency("openvino", "bf16", 3.0, 2.8), quality("bf16", 41)]
    assert chosen(bundle(fp32=records)) == ("openvino", "bf16")
    assert chosen(bundle(fp32=records), backend="onnxruntime") == ("onnxruntime", "fp32")


@pytest.mark.parametrize(
    ("changed", "qualities"),
    [
        ({}, []),  # no quality record
        ({}, [29.9]),  # below the floor
        ({}, [35, 20]),  # one of two below
        ({"ratio": 1.1, "ratio_low": 0.97}, [35]),  # within noise of the reference
        ({"machine": "another"}, [35]),
        ({"library": "click 0.1"}, [35]),
    ],
)
def test_a_precision_that_is_not_proven_here_is_not_chosen(changed: dict[str, Any], qualities: list[float]) -> None:
    def records(**changed: Any) -> list[dict[str, Any]]:
        record = {**latency("openvino", "int8", 4.0, 3.5), **changed}
        return [record, *(quality("int8", worst) for worst in qualities)]

    assert chosen(bundle(fp32=[], int8=records(**changed))) == ("onnxruntime", "fp32")
    if changed:  # the same without the change is chosen, so it is the change that counts
        assert chosen(bundle(fp32=[], int8=records())) == ("openvino", "int8")


def test_the_mean_has_a_floor_of_its_own() -> None:
    low_mean = {**quality("int8", 25, floor=24), "psnr_db": 29.0, "floor_mean_db": 30.0}
    for mean, expected in ((29.9, ("onnxruntime", "fp32")), (30.0, ("openvino", "int8"))):
        records = [latency("openvino", "int8", 4.0, 3.5), {**low_mean, "psnr_db": mean}]
        assert chosen(bundle(fp32=[], int8=records)) == expected


def test_records_of_different_references_are_not_mixed() -> None:
    """An exporter's record says how much faster int8 is than fp32 of the same backend, which may be slow itself."""
    within = latency("openvino", "int8", 3.0, 2.5, reference="fp32")
    assert chosen(bundle(fp32=[], int8=[within, quality("int8", 40)])) == ("onnxruntime", "fp32")
    assert chosen(bundle(fp32=[], int8=[within, quality("int8", 40)]), "openvino") == ("openvino", "int8")
    slow = latency("openvino", "fp32", 0.5, 0.4)
    across = latency("openvino", "int8", 0.9, 0.8)
    assert chosen(bundle(fp32=[slow], int8=[across, quality("int8", 40)])) == ("onnxruntime", "fp32")
    assert chosen(bundle(fp32=[slow], int8=[across, quality("int8", 40)]), "openvino") == ("openvino", "int8")


def test_the_latest_record_counts() -> None:
    records = [latency("openvino", "fp32", 2.0, 1.9), latency("openvino", "fp32", 0.8, 0.7)]
    assert chosen(bundle(fp32=records)) == ("onnxruntime", "fp32")


def test_what_is_asked_for_is_taken() -> None:
    found = bundle(fp32=[], int8=[])
    assert chosen(found, "openvino", "int8") == ("openvino", "int8")
    assert chosen(found, "auto", "bf16") == ("openvino", "bf16")
    assert chosen(found, "auto", "int8") == ("onnxruntime", "int8")


def test_an_asked_precision_runs_on_the_backend_that_was_measured_faster() -> None:
    records = [latency("onnxruntime", "int8", 0.4, 0.3), latency("openvino", "int8", 4.0, 3.5)]
    assert chosen(bundle(fp32=[], int8=records), "auto", "int8") == ("openvino", "int8")


@pytest.mark.parametrize(
    ("backend", "precision"), [("onnxruntime", "bf16"), ("auto", "fp16"), ("openvino", "fp99"), ("nonesuch", "auto")]
)
def test_what_is_not_there_is_an_error(backend: str, precision: str) -> None:
    with pytest.raises(UsageError):
        choose(bundle(fp32=[], int8=[]), backend, precision)


def test_no_library_is_an_error_with_a_hint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "BACKENDS", {"onnxruntime": engines.Backend("x", "no_such_module", "cpu")})
    with pytest.raises(MissingDependencyError, match=r"latentedge\[cpu\]"):
        choose(bundle(fp32=[]))


def test_components_follow_the_denoiser() -> None:
    variant = Variant("x.onnx", "0" * 64, 1)
    decoder = Component("vae_decoder", (), (), {}, {"fp32": variant, "fp16": variant})
    unet = Component("unet", (), (), {}, {"fp32": variant})
    assert component_precision(decoder, "fp16") == "fp16"
    assert component_precision(decoder, "int8") == "fp32"
    assert component_precision(decoder, "int8", "tensorrt-rtx") == "fp16"
    assert component_precision(decoder, "int8+bf16") == "bf16"
    assert component_precision(unet, "int8") == "int8"  # the engine then says that it is not there
    assert [graph_precision(name) for name in ("bf16", "int8+bf16", "fp16")] == ["fp32", "int8", "fp16"]

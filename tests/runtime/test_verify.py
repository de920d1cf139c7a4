"""What `latentedge verify` finds, one fault at a time."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from tokenizers import Tokenizer, models, pre_tokenizers

from latentedge.runtime import verify
from latentedge.runtime.bundle import MANIFEST_NAME, Bundle, TokenizerFile, file_sha256
from latentedge.runtime.cli import run
from latentedge.runtime.errors import PrecisionError, UsageError
from latentedge.runtime.verify import Report, verify_bundle
from tests.runtime import matmul


def write_tokenizer(folder: Path) -> TokenizerFile:
    tokenizer = Tokenizer(models.WordLevel({"red": 0, "heart": 1, "?": 2}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    path = folder / "tokenizer" / "tokenizer.json"
    path.parent.mkdir()
    tokenizer.save(str(path))
    return TokenizerFile("tokenizer/tokenizer.json", file_sha256(path), 2, {"red heart": (0, 1)})


def write_vectors(folder: Path, error: float) -> dict[str, Any]:
    """Two recorded cases of the first graph; the second one's reference is off by ``error``."""
    arrays, path = {}, folder / "vectors.npz"
    for case, batch in enumerate((1, 5)):
        x = np.random.default_rng(batch).standard_normal((batch, 4)).astype(np.float32)
        arrays |= {f"{case}/input/x": x, f"{case}/output/y": x @ matmul.weight(0) + np.float32(case * error)}
    np.savez(path, **arrays)
    return {"vectors": "vectors.npz", "vectors_sha256": file_sha256(path)}


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return write(tmp_path)


def write(folder: Path, error: float = 0.0, golden: tuple[int, ...] = (0, 1)) -> Bundle:
    schedule = {"_class_name": "DDIMScheduler", "beta_start": 0.1}
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(schedule))
    tokenizer = dataclasses.replace(write_tokenizer(folder), golden={"red heart": golden})
    parity = write_vectors(folder, error)
    schedule = {**schedule, "dialect": "compvis", "ancestral_tables": {"posterior_mean_coef1": [0.5]}}
    return matmul.write_bundle(folder, parity, schedule=schedule, tokenizers={"tokenizer": tokenizer})


def outcomes(report: Report, status: str) -> list[str]:
    return [f"{check.kind} {check.subject}" for check in report.checks if check.status == status]


def verified(bundle: Bundle) -> Report:
    return verify_bundle(bundle.path, "onnxruntime")


def test_a_whole_bundle_passes(bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    report = verified(bundle)
    assert report.ok
    assert outcomes(report, "skipped") == ["parity vae_decoder fp32"]
    assert {"file unet/model.onnx", "file vectors.npz", "tokenizer tokenizer", "parity unet fp32"} <= set(
        outcomes(report, "ok")
    )
    assert run(["verify", str(bundle.path), "--backend", "onnxruntime", "--json"], debug=False) == 0
    assert json.loads(capsys.readouterr().out)["ok"] is True


def test_an_output_below_the_floor_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = write(tmp_path, error=0.01)
    report = verified(bundle)
    assert outcomes(report, "FAILED") == ["parity unet fp32"]
    detail = next(check.detail for check in report.checks if check.status == "FAILED")
    assert "max abs error 0.01" in detail
    assert "floor 80 dB" in detail
    assert run(["verify", str(bundle.path), "--backend", "onnxruntime"], debug=False) == 1
    assert "1 of" in capsys.readouterr().err


def test_other_token_ids_fail(tmp_path: Path) -> None:
    assert outcomes(verified(write(tmp_path, golden=(1, 0))), "FAILED") == ["tokenizer tokenizer"]


def test_a_schedule_that_differs_from_the_manifest_fails(bundle: Bundle) -> None:
    path = bundle.path / "scheduler" / "scheduler_config.json"
    path.write_text(path.read_text().replace("0.1", "0.2"))
    assert outcomes(verified(bundle), "FAILED") == ["file scheduler/scheduler_config.json"]
    path.write_text("{")
    assert outcomes(verified(bundle), "FAILED") == ["file scheduler/scheduler_config.json"]


@pytest.mark.parametrize(
    ("file", "skipped"),
    [
        ("unet/model.onnx", ["graph unet fp32", "parity vae_decoder fp32"]),
        ("vectors.npz", ["parity unet fp32", "parity vae_decoder fp32"]),
        ("tokenizer/tokenizer.json", ["tokenizer tokenizer", "parity vae_decoder fp32"]),
    ],
)
def test_what_is_damaged_or_missing_is_named_and_not_used(bundle: Bundle, file: str, skipped: list[str]) -> None:
    path = bundle.path / file
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    report = verified(bundle)
    assert outcomes(report, "FAILED") == [f"file {file}"]
    assert outcomes(report, "skipped") == skipped
    path.unlink()
    report = verified(bundle)
    assert outcomes(report, "FAILED") == [f"file {file}"]
    assert outcomes(report, "skipped") == skipped


def test_weights_beside_a_graph_are_hashed(bundle: Bundle) -> None:
    (bundle.path / "unet" / "model.onnx.data").write_bytes(b"weights")
    components = dict(bundle.manifest.components)
    variant = components["unet"].variants["fp32"]
    variant = dataclasses.replace(variant, external_data={"unet/model.onnx.data": "0" * 64})
    components["unet"] = dataclasses.replace(components["unet"], variants={"fp32": variant})
    changed = dataclasses.replace(bundle.manifest, components=components)
    (bundle.path / MANIFEST_NAME).write_text(json.dumps(changed.to_json()))
    assert outcomes(verified(bundle), "FAILED") == ["file unet/model.onnx.data"]


def test_a_precision_that_the_device_lacks_fails_only_where_it_was_asked_for(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any) -> Any:
        raise PrecisionError("no fp32 here")

    monkeypatch.setattr(verify, "open_engine", refuse)
    assert outcomes(verify_bundle(bundle.path, "onnxruntime"), "FAILED") == []
    asked = verify_bundle(bundle.path, "onnxruntime", "fp32")
    assert outcomes(asked, "FAILED") == ["graph unet fp32", "graph vae_decoder fp32"]


def test_a_precision_that_no_component_has_is_refused(bundle: Bundle) -> None:
    with pytest.raises(UsageError, match="no component in int4"):
        verify_bundle(bundle.path, "onnxruntime", "int4")

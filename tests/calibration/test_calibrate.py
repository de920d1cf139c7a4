from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from latentedge.calibration.calibrate import Options, Reporter, calibrate, reapply
from latentedge.calibration.graph import load_graph
from latentedge.calibration.lint import lint
from latentedge.calibration.metrics import psnr
from latentedge.calibration.plan import Plan
from latentedge.runtime import cli
from latentedge.runtime.bundle import Bundle, file_sha256
from latentedge.runtime.errors import LatentEdgeError, UsageError
from latentedge.runtime.pipeline import Pipeline
from latentedge.runtime.selection import choose, good_enough
from tests.calibration.graphs import write_bundle

BACKENDS = ["onnxruntime", pytest.param("openvino", marks=pytest.mark.slow), "tensorrt"]


@pytest.fixture(scope="session")
def calibrated_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle calibrated for ONNX Runtime; tests get copies of it."""
    made = write_bundle(tmp_path_factory.mktemp("calibrated") / "test.bundle")
    calibrate(made.path, options(floor_db=1.0), Reporter())
    return made.path


@pytest.fixture
def calibrated(calibrated_once: Path, tmp_path: Path) -> Bundle:
    return Bundle.open(shutil.copytree(calibrated_once, tmp_path / "calibrated.bundle"))


def options(backend: str = "onnxruntime", **changes: object) -> Options:
    return Options(samples=4, pictures=3, backend=backend, threads=1, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_whole_way(bundle: Bundle, backend: str) -> None:
    if backend == "openvino":
        pytest.importorskip("openvino")
    outcome = calibrate(bundle.path, options(backend), Reporter())
    written = Bundle.open(bundle.path)
    path, variant = written.variant("unet", "int8")
    assert path.name == "model.int8.onnx"
    assert variant.sha256 == file_sha256(path)
    assert lint(load_graph(path), quantised_outputs=backend == "onnxruntime") == []
    quality = [record for record in variant.measured if record["kind"] == "quality"]
    assert quality
    latency = [record for record in variant.measured if record["kind"] == "latency"]
    assert bool(latency) == (backend != "tensorrt")
    assert not list(bundle.path.rglob(".candidate*"))
    # What the manifest records is what drawing gives.
    engine = "onnxruntime" if backend == "tensorrt" else backend
    record = next(record for record in quality if record["precision"] == "int8")
    request = {"seed": 1_000_000, "steps": 6}
    pictures = []
    for precision in ("fp32", "int8"):
        with Pipeline(written, engine, precision) as pipeline:
            pictures.append(pipeline.generate(**request).array)
    found = psnr(*pictures)
    assert record["psnr_worst_db"] - 0.5 <= found < 90
    # The gate: auto takes INT8 only where both figures allow it.
    chosen = choose(written, engine)
    if chosen.precision.startswith("int8"):
        timed = next(entry for entry in latency if entry["precision"] == chosen.precision)
        assert timed["ratio_low"] > 1
        assert good_enough(written.component("unet"), engine, chosen.precision)
    assert outcome.layers


def test_an_edited_plan_is_applied(calibrated: Bundle) -> None:
    bundle = calibrated
    first = calibrated.component("unet").variants["int8"]
    file = bundle.path / "calibration" / "plan.json"
    data = json.loads(file.read_text())
    layers = {name for entry in data["blocks"] if entry["precision"] == "int8" for name in entry["layers"]}
    block = next(entry for entry in data["blocks"] if entry["precision"] == "int8")
    block["precision"] = "float"
    file.write_text(json.dumps(data))
    second = reapply(bundle.path, Plan.load(file), options(), Reporter())
    assert set(second.layers) == layers - set(block["layers"])
    assert second.bundle.component("unet").variants["int8"].sha256 != first.sha256


def test_a_part_of_the_former_graph_is_neither_measured_nor_kept(calibrated: Bundle) -> None:
    path = calibrated.path
    graph, variant = calibrated.variant("unet", "int8")
    # A part that gives zeros: what is measured with it in the denoiser's place is far from every picture.
    broken = onnx.load(str(graph))
    for tensor in broken.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT:
            tensor.CopyFrom(numpy_helper.from_array(np.zeros_like(numpy_helper.to_array(tensor)) + 1e-6, tensor.name))
    onnx.save(broken, str(graph.with_name("step.int8.onnx")))
    old = dataclasses.replace(
        variant, path="unet/step.int8.onnx", sha256=file_sha256(graph.with_name("step.int8.onnx"))
    )
    unet = calibrated.component("unet")
    whole = {name: entry for name, entry in unet.variants.items() if name != "int8"}
    part = dataclasses.replace(unet, name="unet.step", variants={**whole, "int8": old}, parity={"int8": {"cases": 1}})
    components = {**calibrated.manifest.components, part.name: part}
    manifest = dataclasses.replace(calibrated.manifest, components=components)
    (path / "latentedge.json").write_text(json.dumps(manifest.to_json()))
    quality = [record for record in variant.measured if record["kind"] == "quality"]
    told: list[str] = []
    reapply(path, Plan.load(path / "calibration" / "plan.json"), options(), Reporter(notify=told.append))
    written = Bundle.open(path)
    assert set(written.component("unet.step").variants) == set(whole)
    assert written.component("unet.step").parity == {}
    assert not (path / "unet" / "step.int8.onnx").exists()
    assert any("unet.step" in line for line in told)
    again = [record for record in written.variant("unet", "int8")[1].measured if record["kind"] == "quality"]
    assert [record["psnr_db"] for record in again] == pytest.approx([record["psnr_db"] for record in quality], abs=0.5)


def test_a_plan_of_another_graph_is_refused(calibrated: Bundle, tmp_path: Path) -> None:
    plan = Plan.load(calibrated.path / "calibration" / "plan.json")
    other = write_bundle(tmp_path / "other.bundle", seed=7)
    with pytest.raises(LatentEdgeError, match="another unet"):
        reapply(other.path, plan, options(), Reporter())


def poison(bundle: Bundle, name: str, value: float) -> None:
    """Set one entry of an initialiser, and record the graph's new digest."""
    path, _ = bundle.variant("unet", "fp32")
    model = onnx.load(path)
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == name)
    array = numpy_helper.to_array(tensor).copy()
    array.reshape(-1)[0] = value
    tensor.CopyFrom(numpy_helper.from_array(array, name))
    onnx.save(model, path)
    manifest = bundle.path / "latentedge.json"
    data = json.loads(manifest.read_text())
    data["components"]["unet"]["variants"]["fp32"]["sha256"] = file_sha256(path)
    manifest.write_text(json.dumps(data))


def test_a_huge_activation_is_reported_and_its_layers_stay_float(bundle: Bundle) -> None:
    poison(bundle, "down.0.res.0.norm1.bias", 3e5)
    messages: list[str] = []
    outcome = calibrate(bundle.path, options(floor_db=1.0), Reporter(notify=messages.append))
    assert any(
        "down.0.res.0.norm1_output at timestep" in message and "magnitude 3e+05" in message for message in messages
    )
    assert outcome.plan.kept["down.0.res.0.conv1"] == "its activation is huge"
    assert "down.0.res.0.conv1" not in outcome.layers
    graph = load_graph(outcome.bundle.variant("unet", "int8")[0])
    scales = [
        np.asarray(value.const_value.numpy())  # type: ignore[union-attr]
        for name, value in graph.graph.initializers.items()
        if str(name).endswith("_scale")
    ]
    assert scales
    assert all(np.isfinite(scale).all() and (scale > 0).all() for scale in scales)


def test_below_the_floor_auto_refuses_and_an_explicit_request_warns(calibrated: Bundle) -> None:
    bundle = calibrated
    plan = Plan.load(bundle.path / "calibration" / "plan.json")
    reapply(bundle.path, dataclasses.replace(plan, floor_db=95.0), options(), Reporter())
    written = Bundle.open(bundle.path)
    assert not good_enough(written.component("unet"), "onnxruntime", "int8")
    assert choose(written, "onnxruntime").precision == "fp32"
    with pytest.warns(UserWarning, match=r"below this bundle's quality floor: \d+\.\d dB"):
        Pipeline.open(bundle.path, "onnxruntime", "int8").close()


def test_the_command(bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["calibrate", str(bundle.path), "--samples", "3", "--backend", "onnxruntime"]
    assert cli.run([*arguments, "--json", "--explain"], debug=False) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert result["int8_layers"] > 0
    assert {"backend", "precision", "reason"} <= set(result["auto"])
    assert "shortcuts" in captured.err
    assert "first convolution" in captured.err
    page = (bundle.path / "reports" / "calibration" / "calibration.html").read_text()
    assert "block by block" in page
    assert "down.0.res.0" in page
    assert 'src="http' not in page
    assert json.loads((bundle.path / "reports" / "calibration" / "calibration.json").read_text()) == result
    assert cli.run([*arguments, "--floor", "loud"], debug=False) == 2
    assert "--floor takes decibels like 30dB, found 'loud'" in capsys.readouterr().err


def test_the_command_keeps_to_ten_options() -> None:
    from latentedge.calibration.commands import calibrate as command

    options = {option for parameter in command.params for option in parameter.opts if option.startswith("--")}
    assert options >= {"--prompts", "--samples", "--steps", "--floor", "--ray", "--plan", "--explain"}
    assert len(options) <= 10


@pytest.mark.filterwarnings("ignore:int8 with onnxruntime is below")
def test_compare_writes_a_page_that_needs_nothing_else(
    calibrated: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    sides = [f"{calibrated.path}:onnxruntime:{precision}" for precision in ("fp32", "int8")]
    assert cli.run(["compare", *sides, "--pictures", "3", "-o", str(tmp_path / "out"), "--json"], debug=False) == 0
    data = json.loads(capsys.readouterr().out)
    assert data == json.loads((tmp_path / "out" / "comparison.json").read_text())
    values = [entry["psnr_db"] for entry in data["worst_first"]]
    assert values == sorted(values)
    assert data["psnr_db"]["worst"] == values[0]
    assert len(data["latent_sqnr_db_by_step"]) == 6
    page = (tmp_path / "out" / "comparison.html").read_text()
    assert page.count("data:image/png;base64,") == 1 + 3 * 3
    assert 'src="http' not in page
    assert "href=" not in page
    assert (tmp_path / "out" / "comparison.png").stat().st_size > 1000


def test_a_reference_set_gives_both_distances_and_their_ratio(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    made = write_bundle(tmp_path / "test.bundle", with_encoder=True)
    random = np.random.default_rng(0)
    np.savez(tmp_path / "real.npz", pictures=random.integers(0, 256, (9, 12, 12, 3), dtype=np.uint8))
    sides = [f"{made.path}:onnxruntime:fp32"] * 2
    arguments = ["compare", *sides, "--pictures", "4", "--steps", "2", "-o", str(tmp_path / "out"), "--json"]
    assert cli.run([*arguments, "--reference", str(tmp_path / "real.npz")], debug=False) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["frechet_distance_in_autoencoder_features"] == pytest.approx(0, abs=1e-9)
    found = data["frechet_distance_to_reference"]
    assert found["first"] == found["second"] > 0.01
    assert (found["ratio"], found["pictures"]) == (1.0, 9)
    assert "+0.0 %" in (tmp_path / "out" / "comparison.html").read_text()
    # Pictures with an alpha channel have no colours of their own.
    np.savez(tmp_path / "real.npz", pictures=np.zeros((9, 12, 12, 4), np.uint8))
    assert cli.run([*arguments, "--reference", str(tmp_path / "real.npz")], debug=False) == 2
    assert "expected uint8 pictures [N, H, W, 3], found uint8 [9, 12, 12, 4]" in capsys.readouterr().err


def test_a_side_that_is_no_bundle_is_wrong_use() -> None:
    from latentedge.calibration.compare import Side

    with pytest.raises(UsageError, match="names no bundle"):
        Side.parse("nowhere.bundle:int8")

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from latentedge.calibration.capture import CaptureSettings, capture, open_observed
from latentedge.calibration.graph import load_graph, name_nodes
from latentedge.calibration.observers import TensorStatistics
from latentedge.calibration.plan import BlockPlan, Plan
from latentedge.calibration.requests import captions, requests, vocabulary
from latentedge.calibration.scene import Target
from latentedge.calibration.search import Search, SearchResult, SearchSettings, channel_correction
from latentedge.calibration.sensitivity import Material, choose_blocks
from latentedge.runtime.bundle import Bundle, TensorSpec, TextEncoder
from latentedge.runtime.errors import UsageError
from tests.calibration.graphs import Builder, _model, write_bundle


def search(bundle: Bundle, unusable: tuple[str, ...] = (), **changes: Any) -> SearchResult:
    statistics, probes = capture(CaptureSettings(str(bundle.path), samples=4, threads=1), bundle.path / "c")
    observed = open_observed(bundle, "unet", outputs=False, threads=1)
    model = load_graph(bundle.variant("unet", "fp32")[0])
    name_nodes(model)
    fetched = [observed.fetch(probe.inputs) for probe in probes]
    return Search(model, statistics, SearchSettings(**changes)).run(fetched, unusable)


def test_the_chosen_range_errs_no_more_than_the_maximum(bundle: Bundle) -> None:
    result = search(bundle)
    assert set(result.activations) >= {"mid.0.attn.0.norm_output", "down.0.res.0.norm1_output"}
    for plan in result.activations.values():
        if plan.error is not None and plan.plain is not None and plan.smoothing is None:
            assert plan.error <= plan.plain
    assert any(plan.error < 0.9 * plan.plain for plan in result.activations.values() if plan.error and plan.plain)


def test_balancing_is_found_where_a_channel_stands_out(tmp_path: Any) -> None:
    bundle = write_bundle(tmp_path / "outlier.bundle", outlier=60.0)
    assert search(bundle).activations["mid.0.attn.0.norm_output"].smoothing is not None
    assert search(bundle, balance=False).activations["mid.0.attn.0.norm_output"].smoothing is None


def test_one_rule_alone_is_used_alone(bundle: Bundle) -> None:
    result = search(bundle, observers=("percentile",), balance=False)
    assert {plan.rule for plan in result.activations.values()} <= {"percentile", "split"}


@pytest.mark.parametrize(("louder", "split"), [(1.0, []), (50.0, ["up.0.res.0.shortcut"])])
def test_a_shortcut_is_cut_in_two_where_its_inputs_differ_in_range(
    bundle: Bundle, louder: float, split: list[str]
) -> None:
    """One range for both inputs gives the quiet one the noise of the loud one: twice the noise of a range for each."""
    statistics, probes = capture(CaptureSettings(str(bundle.path), samples=4, threads=1), bundle.path / "c")
    observed = open_observed(bundle, "unet", outputs=False, threads=1)
    fetched = [observed.fetch(probe.inputs) for probe in probes]
    parts = ("mid.0.attn.0_output", "conv_in_output")
    for name in (*parts, "joined"):
        statistics[name] = TensorStatistics.empty(fetched[0][name].shape[1])
    for arrays, probe in zip(fetched, probes, strict=True):
        # Both as loud as each other to begin with.
        one, two = (arrays[name] / np.abs(arrays[name]).max() for name in parts)
        arrays |= {parts[0]: one, parts[1]: louder * two, "joined": np.concatenate([one, louder * two], axis=1)}
        for name in (*parts, "joined"):
            statistics[name].observe(arrays[name], 1, probe.timestep)
    model = load_graph(bundle.variant("unet", "fp32")[0])
    name_nodes(model)
    result = Search(model, statistics, SearchSettings(observers=("absmax",))).run(fetched, ())
    assert result.split == split
    assert ("mid.0.attn.0_output" in result.activations) == bool(split)
    if split:
        assert result.activations[parts[1]].amax == pytest.approx(louder * result.activations[parts[0]].amax, rel=0.05)


def test_an_unusable_activation_gets_no_range(bundle: Bundle) -> None:
    assert "mid.0.attn.0.norm_output" not in search(bundle, ("mid.0.attn.0.norm_output",)).activations


def test_a_layer_whose_output_is_not_finite_on_a_probe_gets_no_range(bundle: Bundle) -> None:
    statistics, probes = capture(CaptureSettings(str(bundle.path), samples=2, threads=1), bundle.path / "c")
    observed = open_observed(bundle, "unet", outputs=False, threads=1)
    model = load_graph(bundle.variant("unet", "fp32")[0])
    name_nodes(model)
    fetched = [observed.fetch(probe.inputs) for probe in probes]
    fetched[1]["mid.0.attn.0.norm_output"][0, 0, 0] = np.nan
    fetched[1]["joined"][0, 0, 0, 0] = np.inf
    result = Search(model, statistics, SearchSettings(balance=False)).run(fetched, ())
    assert not {"mid.0.attn.0.norm_output", "joined"} & set(result.activations)
    assert not result.split
    assert "down.0.res.0.norm1_output" in result.activations
    assert all(np.isfinite(plan.amax) and plan.amax > 0 for plan in result.activations.values())


def test_bias_correction_is_kept_only_where_other_probes_gain() -> None:
    random = np.random.default_rng(0)
    references = [random.standard_normal((4, 8, 5, 5)) for _ in range(4)]
    shift = np.arange(8.0)[:, None, None] / 10
    outputs = [array - shift + 0.01 * random.standard_normal(array.shape) for array in references]
    found = channel_correction(references, outputs, 1)
    np.testing.assert_allclose(found, shift[:, 0, 0], atol=0.01)  # type: ignore[arg-type]
    # A shift that turns around from probe to probe is no bias.
    turning = [array + shift * (-1) ** index for index, array in enumerate(references)]
    assert channel_correction(references, turning, 1) is None
    assert channel_correction(references[:1], outputs[:1], 1) is None


def block(name: str, sqnr: float, saved: float | None, error: float = 0.001) -> BlockPlan:
    error_of_gain = None if saved is None else error
    return BlockPlan(
        name, "int8", "", (name,), sqnr_db=sqnr, psnr_db=60.0, seconds_saved=saved, seconds_error=error_of_gain
    )


def choose(
    monkeypatch: pytest.MonkeyPatch,
    blocks: list[BlockPlan],
    worst: dict[str, float],
    floor: float,
    precision: str = "int8",
    confirmed: dict[str, float] | None = None,
) -> Plan:
    """Plans with a model of the pictures: noise powers of the blocks add up; the set with fewer blocks is faster.

    ``worst``: each block's pictures alone; ``confirmed``: the same of more pictures. Floats in bf16 give 20 dB whatever
    the blocks are.
    """
    from latentedge.calibration import sensitivity

    def quality(plan: Plan, material: Any, target: Any) -> tuple[float, float]:
        noise = sum(10 ** (-material.scene[name] / 10) for name in plan.quantised_blocks())
        value = -10 * np.log10(noise) if noise else 100.0
        value = min(value, 20.0) if target.precision == "int8+bf16" else value
        return value, value

    monkeypatch.setattr(sensitivity, "_picture_quality", quality)
    monkeypatch.setattr(sensitivity, "_fastest", lambda plan, sets, material, target: min(sets, key=len))
    plan = Plan("unet", "openvino", "int8", floor, tuple(blocks), {})
    target = Target("openvino", precision, "bf16")
    confirming = None if confirmed is None else (lambda: confirmed)
    material = Material(None, None, [], worst, confirming)  # type: ignore[arg-type]
    return choose_blocks(plan, material, target, lambda stage, done, total: None)


def test_the_plan_drops_what_costs_most_for_what_it_saves(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = [block("good", 50, 0.01), block("poor", 20, 0.01), block("fair", 40, 0.01), block("slow", 60, -0.02)]
    plan = choose(monkeypatch, blocks, {"good": 50, "poor": 25, "fair": 40, "slow": 60}, 30)
    assert plan.quantised_blocks() == {"good", "fair"}
    reasons = {entry.name: entry.reason for entry in plan.blocks}
    assert reasons["slow"] == "measured slower in INT8"
    assert reasons["poor"] == "the pictures fall below 31 dB with it and the others"
    assert reasons["good"].startswith("faster")


def test_shortcuts_must_be_harmless(monkeypatch: pytest.MonkeyPatch) -> None:
    shortcut = dataclasses.replace(block("shortcuts", 45, 0.01), psnr_db=38.0)
    plan = choose(monkeypatch, [block("good", 50, 0.01), shortcut], {"good": 50, "shortcuts": 50}, 30)
    assert plan.quantised_blocks() == {"good"}
    assert "not harmless: 38.0 dB alone" in {entry.reason for entry in plan.blocks}


def test_floats_that_spoil_every_set_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = choose(monkeypatch, [block("good", 50, 0.01)], {"good": 50}, 30, "int8+bf16")
    assert (plan.precision, plan.quantised_blocks()) == ("int8", {"good"})
    plan = choose(monkeypatch, [block("good", 50, 0.01)], {"good": 50}, 15, "int8+bf16")
    assert plan.precision == "int8+bf16"


def test_a_block_below_the_floor_alone_does_not_take_the_others_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    ruinous = dataclasses.replace(block("ruinous", 60, 0.05), psnr_db=12.0)
    plan = choose(monkeypatch, [ruinous, block("good", 50, 0.01)], {"ruinous": 12, "good": 50}, 30)
    assert plan.quantised_blocks() == {"good"}


def test_a_block_that_breaks_the_floor_does_not_end_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone its one picture was lucky; the blocks behind it in the order are as good as those before it."""
    names = [f"block {number}" for number in range(20)]
    blocks = [block(name, 60 - number, None) for number, name in enumerate(names)]
    worst = dict.fromkeys(names, 50.0) | {"block 3": 20.0, "block 11": 22.0}
    assert choose(monkeypatch, blocks, worst, 30).quantised_blocks() == set(names) - {"block 3", "block 11"}


def test_a_gain_within_its_error_does_not_order_the_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = [block("good", 60, 0.001, 0.002), block("fair", 50, 0.0, 0.002), block("poor", 45, 0.05, 0.09)]
    plan = choose(monkeypatch, blocks, {"good": 34.5, "fair": 34.5, "poor": 34.5}, 30)  # any two hold the floor
    assert plan.quantised_blocks() == {"good", "fair"}


def test_more_pictures_confirm_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = [block("good", 50, 0.01), block("lucky", 40, 0.01)]
    few = {"good": 50.0, "lucky": 45.0}
    assert choose(monkeypatch, blocks, few, 30).quantised_blocks() == {"good", "lucky"}
    more = {"good": 50.0, "lucky": 25.0}
    assert choose(monkeypatch, blocks, few, 30, confirmed=more).quantised_blocks() == {"good"}
    # The first one in the order breaks the floor in more pictures: those behind it are tried without it.
    unlucky = {"good": 20.0, "lucky": 45.0}
    assert choose(monkeypatch, blocks, few, 30, confirmed=unlucky).quantised_blocks() == {"lucky"}
    # None holds the floor: what came closest is written for those who ask for it, not everything.
    blocks, few = [*blocks, block("ruinous", 20, 0.01)], few | {"ruinous": 10.0}
    refused = choose(monkeypatch, blocks, few, 30, confirmed={"good": 20.0, "lucky": 20.0, "ruinous": 5.0})
    assert refused.quantised_blocks() == {"good", "lucky"}
    assert refused.blocks[0].reason == "holds 30 dB in few pictures and not in more; the gate decides"
    assert refused.blocks[2].reason == "the pictures fall below 31 dB with it and the others"


def test_without_a_plan_above_the_floor_everything_is_int8_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = choose(monkeypatch, [block("one", 20, None)], {"one": 12}, 30)
    assert plan.quantised_blocks() == {"one"}
    assert plan.blocks[0].reason == "no plan holds 30 dB; the gate refuses this one"


def test_requests_follow_the_conditioning(bundle: Bundle) -> None:
    def made(**changes: Any) -> dict[str, Any]:
        conditioning = dataclasses.replace(bundle.manifest.conditioning, **changes)
        manifest = dataclasses.replace(bundle.manifest, conditioning=conditioning)
        return requests(Bundle(bundle.path, manifest), 3, 5)[2]

    assert set(made()) == {"seed", "steps"}
    assert made(cross_attention="class", classes=7)["class_label"] in range(7)
    vector = made(cross_attention="embeddings", embedding_width=16)["embeddings"]
    assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-5)
    with pytest.raises(UsageError, match="no denoiser"):
        requests(Bundle(bundle.path, dataclasses.replace(bundle.manifest, components={})), 1, None)


def test_captions_of_the_bundle_come_first_and_held_out_ones_are_others(bundle: Bundle) -> None:
    assert not set(captions(bundle, held_out=True)) & set(captions(bundle, held_out=False))
    recorded = {"prompts": ["a", "b", "c"]}
    own = Bundle(bundle.path, dataclasses.replace(bundle.manifest, calibration=recorded))
    assert (captions(own, held_out=False), captions(own, held_out=True)) == (["a", "c"], ["b"])
    apart = {**recorded, "held_out_prompts": ["d"]}
    own = Bundle(bundle.path, dataclasses.replace(bundle.manifest, calibration=apart))
    assert (captions(own, held_out=False), captions(own, held_out=True)) == (["a", "b", "c"], ["d"])


def test_a_text_encoder_without_a_tokenizer_gets_ids_of_its_vocabulary(bundle: Bundle) -> None:
    b = Builder()
    b.node("Gather", [b.constant("table", np.zeros((99, 6), np.float32)), "input_ids"], "hidden")
    model = ir.from_proto(_model(b, {"input_ids": ["batch", 5]}, "hidden"))
    ir.save(model, bundle.path / "vae_decoder" / "model.onnx")
    assert vocabulary(bundle, "vae_decoder") == 99
    # Both branches of a guided model get ids.
    manifest = bundle.manifest
    taken = (TensorSpec("input_ids", "int64", ("batch", 5)),)
    encoder = dataclasses.replace(manifest.components["vae_decoder"], inputs=taken)
    conditioning = dataclasses.replace(
        manifest.conditioning, cross_attention="text", encoders=(TextEncoder("vae_decoder", None),)
    )
    components = {**manifest.components, "vae_decoder": encoder}
    changed = dataclasses.replace(manifest, conditioning=conditioning, components=components)
    (made,) = requests(Bundle(bundle.path, changed), 1, 5)
    for name in ("prompt_ids", "negative_prompt_ids"):
        (ids,) = made[name]
        assert (ids.shape, ids.dtype, ids.max() < 99) == ((1, 5), np.dtype(np.int64), True)


def test_a_tensorrt_compiler_takes_the_graph(bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tensorrt_rtx")
    from latentedge.calibration.calibrate import Options, Reporter, calibrate
    from latentedge.runtime import cli

    calibrate(bundle.path, Options(samples=2, pictures=1, backend="tensorrt", floor_db=1.0, threads=1), Reporter())
    arguments = ["build", str(bundle.path), "--backend", "tensorrt-rtx", "--check", "--precision", "int8", "--json"]
    assert cli.run([*arguments, "--compute-capability", "8.6,8.9,12.0"], debug=False) == 0
    assert "int8" in json.dumps(json.loads(capsys.readouterr().out))

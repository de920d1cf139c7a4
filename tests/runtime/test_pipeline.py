"""The pipeline above null engines: batches, guidance, seeds, tasks, and what is refused."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from PIL import Image

from latentedge.runtime import guidance
from latentedge.runtime.bundle import ConcatInput, Conditioning
from latentedge.runtime.denoiser import Branch, Denoiser
from latentedge.runtime.engines import EngineOptions
from latentedge.runtime.errors import UsageError
from latentedge.runtime.noise import NoiseStream
from latentedge.runtime.pipeline import Pipeline
from tests.runtime import bundles

IDS = np.array([[1, 2, 3, 4, 5]])
NEGATIVE = np.array([[9, 8, 7, 6, 5]])
LATENTS = np.random.default_rng(0).standard_normal((2, 4, 8, 8)).astype(np.float32)


def draw(pipe: Pipeline, **options: Any) -> Any:
    ids = {"prompt_ids": IDS, "negative_prompt_ids": NEGATIVE}
    return pipe.generate(**{**ids, **options})


def counting_unet() -> tuple[Any, list[int]]:
    batches: list[int] = []

    def unet(inputs: Any) -> Any:
        batches.append(len(inputs["sample"]))
        return bundles.unet(inputs)

    return unet, batches


def test_the_result_has_the_contract_shapes() -> None:
    result = draw(bundles.pipeline(), latents=LATENTS)
    assert result.array.shape == (2, 32, 32, 3)
    assert result.array.dtype == np.float32
    assert 0 <= result.array.min() < result.array.max() <= 1
    assert result.latents.shape == LATENTS.shape
    assert [image.size for image in result.images] == [(32, 32)] * 2
    assert len(result.timings["steps"]) == 5
    assert {"condition", "encode", "decode"} <= set(result.timings)


def test_guidance_takes_one_batch_of_two_and_a_scale_of_one_takes_none() -> None:
    unet, batches = counting_unet()
    pipe = bundles.pipeline(unet=unet)
    draw(pipe, seed=1)
    assert batches == [2] * 5
    batches.clear()
    draw(pipe, seed=1, guidance_scale=1.0)
    assert batches == [1] * 5


@pytest.mark.parametrize(("below_one", "guided"), [(True, [0.5, 2.0]), (False, [2.0])])
def test_a_scale_below_one_guides_where_the_original_does(below_one: bool, guided: list[float]) -> None:
    unet, batches = counting_unet()
    manifest = bundles.text_manifest()
    conditioning = dataclasses.replace(manifest.conditioning, guidance_below_one=below_one)
    pipe = bundles.pipeline(dataclasses.replace(manifest, conditioning=conditioning), unet=unet)
    for scale in (0.5, 1.0, 2.0):
        batches.clear()
        draw(pipe, seed=1, guidance_scale=scale)
        assert batches == [2 if scale in guided else 1] * 5, scale


def test_guidance_in_two_runs_equals_one_batch() -> None:
    unet, batches = counting_unet()
    manifest = bundles.text_manifest()
    low = bundles.pipeline(manifest, unet=unet)
    low.options = EngineOptions(low_memory=True)
    together = draw(bundles.pipeline(manifest), latents=LATENTS)
    apart = draw(low, latents=LATENTS)
    assert batches == [2] * 10
    assert np.abs(together.latents - apart.latents).max() < 1e-6


def test_guidance_only_inside_an_interval_of_sigmas() -> None:
    unet, batches = counting_unet()
    pipe = bundles.pipeline(unet=unet)
    steps = list(
        pipe.steps(prompt_ids=IDS, negative_prompt_ids=NEGATIVE, latents=LATENTS, guidance_interval=(0.5, 3.0))
    )
    assert batches == [4 if 0.5 <= step.sigma <= 3.0 else 2 for step in steps]
    assert set(batches) == {2, 4}


def test_the_interval_counts_from_where_a_picture_starts() -> None:
    unet, batches = counting_unet()
    picture = np.random.default_rng(1).random((1, 32, 32, 3)).astype(np.float32)
    options = {"image": picture, "strength": 0.6, "steps": 10, "seed": 2, "guidance_interval": (0.5, 3.0)}
    ids = {"prompt_ids": IDS, "negative_prompt_ids": NEGATIVE}
    steps = list(bundles.pipeline(unet=unet).steps(**ids, **options))
    assert [step.index for step in steps] == list(range(4, 10))
    assert batches == [2 if 0.5 <= step.sigma <= 3.0 else 1 for step in steps]
    assert set(batches) == {1, 2}


@pytest.mark.parametrize("low_memory", [False, True])
def test_differences_between_branches_are_kept(low_memory: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """This UNet's branches always differ by the same: where that is expected of it, nothing is lost by keeping it."""
    monkeypatch.setattr(guidance, "_expected", lambda plan: np.ones(len(plan.timesteps), np.float32))
    monkeypatch.setattr(guidance, "FADING", 1.0)
    unet, batches = counting_unet()
    pipe = bundles.pipeline(unet=unet)
    pipe.options = EngineOptions(low_memory=low_memory)
    options: dict[str, Any] = {"latents": LATENTS[:1], "guidance_rescale": 0.3}
    every = draw(pipe, **options).latents
    batches.clear()
    kept = draw(pipe, **options, guidance_every=3).latents
    assert batches == ([1, 1, 1, 1, 1, 1, 1] if low_memory else [2, 1, 1, 2, 1])
    assert np.abs(kept - every).max() < 1e-5
    assert np.array_equal(draw(pipe, **options, guidance_every=range(5)).latents, every)


def test_kept_differences_are_those_of_the_last_whole_evaluation() -> None:
    def unet(inputs: Any) -> Any:
        shift = inputs["encoder_hidden_states"].mean(axis=(1, 2)) * inputs["timestep"]
        return {"out_sample": inputs["sample"] * np.float32(0.3) + shift.astype(np.float32)[:, None, None, None]}

    pipe = bundles.pipeline(unet=unet)
    outputs: list[Any] = []
    for every in (1, 2, [0, 3]):
        options: dict[str, Any] = {"latents": LATENTS[:1], "guidance_every": every}
        outputs.append([step.latents for step in pipe.steps(prompt_ids=IDS, negative_prompt_ids=NEGATIVE, **options)])
    exact, second, listed = outputs
    for index in range(5):
        errors = [float(np.abs(found[index] - exact[index]).max()) for found in (second, listed)]
        assert all((error < 1e-6) == (index == 0) for error in errors)
    # Nearer to the truth with a younger difference.
    assert np.abs(second[2] - exact[2]).max() < 0.7 * np.abs(listed[2] - exact[2]).max()


def test_an_instructed_edit_keeps_three_branches() -> None:
    def unet(inputs: Any) -> Any:
        return bundles.unet(inputs)

    manifest = bundles.text_manifest()
    engine = bundles.pipeline(manifest, unet=unet).engine("unet")
    hidden = np.random.default_rng(3).standard_normal((3, 1, 5, bundles.WIDTH)).astype(np.float32)
    branches = [Branch({"encoder_hidden_states": one}) for one in hidden]
    combine = guidance.text_and_image(7.5, 1.5)
    sample = LATENTS[:1]
    plan = [None, 1.0, 0.0]
    model = Denoiser(engine, branches, combine).following(plan)
    exact = Denoiser(engine, branches, combine)
    assert np.array_equal(model(sample, 500.0), exact(sample, 500.0))
    assert np.abs(model(2 * sample, 400.0) - exact(2 * sample, 400.0)).max() < 1e-5
    alone = engine.run({"sample": sample, "timestep": np.float32([300]), "encoder_hidden_states": hidden[0]})[
        "out_sample"
    ]
    assert np.array_equal(model(sample, 300.0), alone)


@pytest.mark.parametrize("every", [0, -1, [], [3, -1]])
def test_evaluations_of_guidance_that_do_not_exist(every: Any) -> None:
    with pytest.raises(UsageError, match="guidance_every"):
        draw(bundles.pipeline(), seed=1, guidance_every=every)


def test_kept_differences_do_not_go_with_step_caching() -> None:
    pipe = bundles.pipeline()
    pipe.options = EngineOptions(cache_interval=2)
    with pytest.raises(UsageError, match="does not go with step caching"):
        draw(pipe, seed=1, guidance_every=2)


def test_the_negative_prompt_and_the_scale_matter() -> None:
    pipe = bundles.pipeline()
    base = draw(pipe, latents=LATENTS).latents
    for change in ({"negative_prompt_ids": IDS}, {"guidance_scale": 3.5}, {"prompt_ids": NEGATIVE}):
        assert np.abs(draw(pipe, latents=LATENTS, **change).latents - base).max() > 1e-3


def test_a_seed_gives_the_same_picture_and_another_seed_another() -> None:
    pipe = bundles.pipeline()
    first, again, other = (draw(pipe, seed=seed) for seed in (7, 7, 8))
    assert np.array_equal(first.array, again.array)
    assert np.abs(first.array - other.array).max() > 0.05
    assert first.seed == 7


def test_a_batch_of_two_equals_two_batches_of_one() -> None:
    pipe = bundles.pipeline()
    both = draw(pipe, seed=[3, 4], eta=1.0).latents
    single = [draw(pipe, seed=[seed], eta=1.0).latents[0] for seed in (3, 4)]
    assert np.abs(both - np.stack(single)).max() < 1e-6


def test_a_batch_is_drawn_for_each_prompt() -> None:
    pipe = bundles.pipeline()
    assert draw(pipe, seed=1, batch_size=3).latents.shape == (3, 4, 8, 8)
    found = draw(pipe, seed=1, batch_size=2, prompt_ids=np.concatenate([IDS, NEGATIVE])).latents
    noise = NoiseStream("torch", 1).normal((4, 4, 8, 8))
    first, second = (draw(pipe, latents=noise[rows], prompt_ids=ids).latents for rows, ids in
                     ((slice(0, 2), IDS), (slice(2, 4), NEGATIVE)))  # fmt: skip
    assert np.abs(found - np.concatenate([first, second])).max() < 1e-6


def test_strength_zero_returns_the_picture() -> None:
    picture = np.random.default_rng(1).random((1, 32, 32, 3)).astype(np.float32)
    pipe = bundles.pipeline()
    result = draw(
        pipe, image=picture, strength=0.0, seed=5, rng="numpy", noise=np.zeros((1, 1, 4, 8, 8)), latents=LATENTS[:1]
    )
    assert np.abs(result.latents - pipe.encode(picture)).max() < 1e-6


def test_more_strength_moves_further_from_the_picture() -> None:
    picture = np.random.default_rng(1).random((1, 32, 32, 3)).astype(np.float32)
    pipe = bundles.pipeline()
    start = pipe.encode(picture)
    far = [
        np.abs(draw(pipe, image=picture, strength=value, seed=5).latents - start).mean() for value in (0.2, 0.6, 1.0)
    ]
    assert far[0] < far[1] < far[2]


def test_a_mask_keeps_what_is_outside_of_it() -> None:
    picture = np.random.default_rng(1).random((1, 32, 32, 3)).astype(np.float32)
    mask = np.zeros((1, 32, 32), np.float32)
    mask[:, :, 16:] = 1
    pipe = bundles.pipeline()
    noise = np.zeros((2, 1, 4, 8, 8), np.float32)
    result = draw(pipe, image=picture, mask=mask, strength=1.0, latents=LATENTS[:1], noise=noise)
    kept = np.abs(result.latents - pipe.encode(picture))
    assert kept[..., :4].max() < 1e-5
    assert kept[..., 4:].max() > 0.1


def test_a_grey_mask_paints_from_the_middle_on() -> None:
    picture = np.random.default_rng(1).random((1, 32, 32, 3)).astype(np.float32)
    mask = np.zeros((1, 32, 32), np.float32)
    mask[:, :, 8:] = 0.49
    mask[:, :, 16:] = 0.5
    pipe = bundles.pipeline()
    options = {
        "image": picture,
        "strength": 1.0,
        "latents": LATENTS[:1],
        "noise": np.zeros((2, 1, 4, 8, 8), np.float32),
    }
    found, expected = draw(pipe, mask=mask, **options), draw(pipe, mask=(mask >= 0.5).astype(np.float32), **options)
    assert np.array_equal(found.latents, expected.latents)


def test_conditioning_pictures_follow_the_latent_in_order() -> None:
    seen: list[Any] = []

    def unet(inputs: Any) -> Any:
        seen.append(inputs["sample"])
        return bundles.unet(inputs)

    concat = (ConcatInput("mask", 1), ConcatInput("masked_image_latent", 4, scaled=True))
    manifest = bundles.text_manifest(components=bundles.text_components(9), task="inpainting")
    manifest = dataclasses.replace(manifest, conditioning=dataclasses.replace(manifest.conditioning, concat=concat))
    pipe = bundles.pipeline(manifest, unet=unet)
    picture = np.full((32, 32, 3), 200, np.uint8)
    mask = np.zeros((32, 32), np.uint8)
    mask[8:16] = 255
    draw(pipe, image=Image.fromarray(picture), mask=Image.fromarray(mask), seed=0)
    sample = seen[0]
    assert sample.shape == (2, 9, 8, 8)
    assert sample[0, 4, :, 0].tolist() == [0, 0, 1, 1, 0, 0, 0, 0]
    value = (200 / 127.5 - 1) * 0.5
    assert sample[0, 5, :, 0] == pytest.approx([value, value, 0, 0, value, value, value, value], abs=1e-6)


def test_steps_yields_what_generate_ends_with() -> None:
    pipe = bundles.pipeline()
    steps = list(pipe.steps(prompt_ids=IDS, negative_prompt_ids=NEGATIVE, latents=LATENTS))
    assert [step.index for step in steps] == list(range(5))
    assert all(step.latents.shape == step.denoised.shape == LATENTS.shape for step in steps)
    assert np.array_equal(steps[-1].latents, draw(pipe, latents=LATENTS).latents)


def test_a_schedule_that_names_its_sampler_is_followed() -> None:
    pipe = bundles.pipeline()
    euler = {**bundles.SCHEDULE, "_class_name": "EulerDiscreteScheduler"}
    assert pipe.bundle.defaults.sampler == "ddim"
    found = draw(pipe, latents=LATENTS, schedule=euler).latents
    assert np.array_equal(found, draw(pipe, latents=LATENTS, sampler="euler", schedule=euler).latents)
    assert np.abs(found - draw(pipe, latents=LATENTS).latents).max() > 0.1
    unnamed = {name: value for name, value in euler.items() if name != "_class_name"}
    assert np.array_equal(
        draw(pipe, latents=LATENTS, schedule=unnamed).latents,
        draw(pipe, latents=LATENTS, sampler="ddim", schedule=unnamed).latents,
    )


@pytest.mark.parametrize("ids", [np.repeat(IDS, 3, axis=0), np.repeat(IDS, 3, axis=0).tolist()])
def test_every_row_of_token_ids_is_a_picture(ids: Any) -> None:
    assert len(draw(bundles.pipeline(), prompt_ids=ids, seed=1).images) == 3


def test_a_picture_takes_the_size_of_given_latents_and_of_one_given_side() -> None:
    pipe = bundles.pipeline()
    picture = np.zeros((40, 56, 3), np.uint8)
    assert draw(pipe, image=picture, strength=0.5, seed=1).array.shape == (1, 40, 56, 3)
    assert draw(pipe, image=picture, strength=0.5, latents=LATENTS[:1]).array.shape == (1, 32, 32, 3)
    assert draw(pipe, image=picture, strength=0.5, height=24, seed=1).array.shape == (1, 24, 56, 3)


def test_the_default_eta_goes_with_the_default_sampler() -> None:
    manifest = bundles.text_manifest()
    defaults = dataclasses.replace(manifest.defaults, sampler="ddim", eta=1.0)
    schedule = {**manifest.schedule, "dialect": "compvis"}
    pipe = bundles.pipeline(dataclasses.replace(manifest, defaults=defaults, schedule=schedule))

    def latents(**options: Any) -> Any:
        return draw(pipe, seed=3, guidance_scale=1.0, **options).latents

    noisy, plain = latents(eta=1.0), latents(eta=0.0)
    assert np.abs(noisy - plain).max() > 0.1
    for name in (None, "ddim", "DDIMScheduler"):
        assert (latents(sampler=name) == noisy).all()
    for name in ("plms", "dpm_solver"):
        assert (latents(sampler=name) == latents(sampler=name, eta=0.0)).all()
    with pytest.raises(UsageError, match="PLMS is deterministic"):
        latents(sampler="plms", eta=1.0)


def test_a_callback_stops_the_loop() -> None:
    unet, batches = counting_unet()
    result = draw(bundles.pipeline(unet=unet), latents=LATENTS, callback=lambda step: step.index == 1)
    assert len(batches) == 2
    assert len(result.timings["steps"]) == 2


def test_interleaved_runs_do_not_mix_their_prompts() -> None:
    pipe = bundles.pipeline()
    options = {"latents": LATENTS, "negative_prompt_ids": NEGATIVE}
    alone = draw(pipe, latents=LATENTS).latents
    first = pipe.steps(prompt_ids=IDS, **options)
    second = pipe.steps(prompt_ids=NEGATIVE, **options)
    last = [pair[0] for pair in zip(first, second, strict=True)][-1]
    assert np.abs(last.latents - alone).max() < 1e-6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, found 0"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"height": 30, "width": 32}, "height must be a multiple of 8, found 30"),
        ({"colour": "red"}, "no argument colour"),
        ({"sampler": "magic"}, "magic"),
        ({"class_label": 3}, "takes no class_label"),
        ({"strength": 0.5}, "needs an image"),
        ({"image": np.zeros((32, 32, 3)), "strength": 1.5}, "strength goes from 0 to 1"),
        ({"image": np.zeros((32, 32, 3), np.uint8), "mask": np.zeros((16, 32), np.uint8)}, "the mask is 32x16"),
        ({"image": np.full((32, 32, 3), 2.0)}, "must lie in 0..1"),
        ({"image": np.zeros((32, 32, 4), np.uint8)}, r"expected \[N, H, W, 3\]"),
        ({"latents": LATENTS[:, :3]}, r"latents: expected"),
        ({"prompt_ids": IDS.astype(np.float32)}, "token ids must be integers"),
        ({"prompt_ids": IDS - 2}, "counted from 0, found -1"),
        ({"noise": np.zeros((1, 2, 4, 8, 8)), "eta": 1.0, "latents": LATENTS}, "holds 1 draws"),
        ({"rng": "dice"}, "dice"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        draw(bundles.pipeline(), **options)


def test_a_bundle_without_a_tokenizer_says_what_it_takes() -> None:
    with pytest.raises(UsageError, match="no tokenizer"):
        bundles.pipeline().generate("a cat")


def test_guidance_without_an_unconditional_input_is_refused() -> None:
    manifest = bundles.text_manifest()
    conditioning = Conditioning("text", manifest.conditioning.encoders)
    pipe = bundles.pipeline(dataclasses.replace(manifest, conditioning=conditioning))
    with pytest.raises(UsageError, match="no unconditional input"):
        pipe.generate(prompt_ids=IDS, seed=1)

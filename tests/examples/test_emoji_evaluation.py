"""How the embedded default model is judged, and its prompt files."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("torch")

from examples.emoji.captions import BACKGROUNDS, HERE, STYLES, build_tokenizer, read_concepts
from examples.emoji.data import background_colours, held_out
from examples.emoji.evaluate import border_backgrounds, random_places
from examples.emoji.pack import load
from examples.emoji.prompt_lists import prompts


def test_border_tells_every_background_whatever_is_inside_and_with_some_noise() -> None:
    random = np.random.default_rng(0)
    pictures = np.repeat(np.repeat(background_colours()[:, None, None], 64, 1), 64, 2).astype(int)
    pictures += random.integers(-9, 10, pictures.shape)
    pictures[:, 8:56, 8:56] = (212, 62, 68)
    pictures = pictures.clip(0, 255).astype(np.uint8)
    assert border_backgrounds(pictures).tolist() == list(range(len(BACKGROUNDS)))


def test_places_differ_and_are_allowed() -> None:
    allowed = held_out(301)
    places = random_places(48, allowed, 13)
    assert len({tuple(place) for place in places}) == 48
    assert all(allowed[tuple(place)] for place in places)


@pytest.mark.parametrize(("name", "unseen", "seed"), [("heldout", True, 31), ("calibration", False, 32)])
def test_prompt_files_are_what_the_module_writes(name: str, unseen: bool, seed: int) -> None:
    lines = (HERE / "prompts" / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    assert lines == prompts(64, unseen=unseen, seed=seed)


def test_demo_prompts_are_eight_and_known() -> None:
    lines = (HERE / "prompts" / "demo.txt").read_text(encoding="utf-8").splitlines()
    names = {name for concept in read_concepts() for name in concept.names}
    assert len(lines) == 8
    for line in lines:
        name, style, background = line.split(", ")
        assert name in names
        assert style in STYLES
        assert background.split()[2] in BACKGROUNDS


def test_committed_checkpoint_loads_strictly_and_fits_its_tokenizer() -> None:
    first_stage, denoiser, parameters = load()
    tokenizer = build_tokenizer(read_concepts())
    assert (HERE / "tokenizer.json").read_text(encoding="utf-8") == tokenizer.to_str(pretty=True)
    assert denoiser.text_encoder.vocab_size >= tokenizer.get_vocab_size()
    assert 0.1 < parameters["scale_factor"] < 10
    assert (HERE / "model.safetensors").stat().st_size < 30_000_000
    assert first_stage.embed_dim == parameters["channels"]

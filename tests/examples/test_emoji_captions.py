"""Captions and tokenizer of the embedded default model."""

from __future__ import annotations

import numpy as np
import pytest

from examples.emoji.captions import (
    BACKGROUNDS,
    DEFAULT_BACKGROUND,
    DEFAULT_STYLE,
    STYLES,
    TOKENS,
    Concept,
    build_tokenizer,
    caption,
    encode,
    random_caption,
    read_concepts,
)

CONCEPTS = read_concepts()


def test_captions_name_what_they_are_given() -> None:
    assert caption("red heart", "flat", "blue") == "red heart, flat, on a blue background"
    assert caption("red heart", None, "orange") == "red heart, on an orange background"
    assert caption("red heart", "3d", None) == "red heart, 3d"


def test_names_are_unique_across_concepts() -> None:
    names = [name for concept in CONCEPTS for name in concept.names]
    assert len(names) == len(set(names))
    assert 300 <= len(CONCEPTS) <= 500


@pytest.mark.parametrize("background", BACKGROUNDS)
@pytest.mark.parametrize("style", STYLES)
def test_only_the_defaults_may_stay_unsaid(style: str, background: str) -> None:
    random = np.random.default_rng(0)
    concept = Concept("cat face", ("cat face", "kitty"))
    said = {random_caption(concept, style, background, random) for _ in range(200)}
    assert all(style in one for one in said) == (style != DEFAULT_STYLE)
    assert all(f"{background} background" in one for one in said) == (background != DEFAULT_BACKGROUND)
    assert {"cat face" in one for one in said} == {True, False}
    assert all("cat face" in one or "kitty" in one for one in said)


def test_tokenizer_knows_every_caption_and_gives_it_back() -> None:
    tokenizer = build_tokenizer(CONCEPTS)
    for concept in CONCEPTS:
        for name in concept.names:
            sentence = caption(name, "noto", "yellow")
            encoding = tokenizer.encode(sentence)
            assert len(encoding.ids) == TOKENS
            assert "[UNK]" not in encoding.tokens
            assert "[SEP]" in encoding.tokens, f"{sentence!r} is cut"
            assert tokenizer.decode(encoding.ids).replace(" ", "") == sentence.lower().replace(" ", "")


def test_tokenizer_is_the_same_each_time_and_frames_the_empty_prompt() -> None:
    one, other = build_tokenizer(CONCEPTS), build_tokenizer(CONCEPTS)
    assert one.to_str() == other.to_str()
    ids = encode(one, ["", "a thing that nobody drew"])
    assert ids.dtype == np.int64
    assert ids[0].tolist() == [2, 3] + [0] * (TOKENS - 2)
    assert ids.max() < one.get_vocab_size()

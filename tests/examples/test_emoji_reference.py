from __future__ import annotations

import numpy as np

from examples.emoji.captions import STYLES, read_concepts
from examples.emoji.data import Pictures, background_colours, held_out
from examples.emoji.reference import trained_pictures


def test_only_trained_combinations_are_composed() -> None:
    """Emoji whose colour tells concept and style, with one opaque pixel on every background."""
    labels = [concept.label for concept in read_concepts()]
    pictures = np.zeros((len(labels) * len(STYLES), 64, 64, 4), np.uint8)
    number = np.arange(len(pictures))
    pictures[:, 0, 0] = np.stack([number % 256, number // 256, np.full_like(number, 7), np.full_like(number, 255)], 1)
    concept, style = np.divmod(number, len(STYLES))
    composed = trained_pictures(Pictures(pictures, concept, style, labels), count=400)
    assert composed.shape == (400, 64, 64, 3)
    assert composed.dtype == np.uint8
    trained = ~held_out(len(labels))
    colours = [tuple(colour) for colour in background_colours()]
    seen = set()
    for one in composed:
        own = int(one[0, 0, 0]) + 256 * int(one[0, 0, 1])
        place = (own // len(STYLES), own % len(STYLES), colours.index(tuple(one[1, 1])))
        assert trained[place]
        seen.add(place)
    assert len(seen) == 400

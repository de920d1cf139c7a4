"""What the text encoder and the denoiser are trained on: latents of every combination, and captions for them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from examples.emoji.captions import (
    BACKGROUNDS,
    DEFAULT_BACKGROUND,
    STYLES,
    Concept,
    build_tokenizer,
    encode,
    random_caption,
    read_concepts,
)
from examples.emoji.data import held_out

DROPPED_CONDITIONS = 0.1
WHITE_SHARE = 0.2


@dataclass(frozen=True)
class Corpus:
    """Scaled latents float32 [concepts, styles, backgrounds, channels, 16, 16]; what they show; what is held out."""

    latents: Tensor
    concepts: list[Concept]
    unseen: np.ndarray
    tokenizer: Tokenizer

    def batch(
        self, count: int, random: np.random.Generator, dropped: float = DROPPED_CONDITIONS
    ) -> tuple[Tensor, Tensor]:
        """Random seen combinations, a caption each: latents [count, channels, 16, 16], ids [count, tokens]."""
        names, white = list(BACKGROUNDS), list(BACKGROUNDS).index(DEFAULT_BACKGROUND)
        places: list[tuple[int, int, int]] = []
        sentences: list[str] = []
        while len(places) < count:
            concept, style = int(random.integers(len(self.concepts))), int(random.integers(len(STYLES)))
            background = white if random.random() < WHITE_SHARE else int(random.integers(len(names)))
            if self.unseen[concept, style, background]:
                continue
            places.append((concept, style, background))
            empty = random.random() < dropped
            said = random_caption(self.concepts[concept], STYLES[style], names[background], random)
            sentences.append("" if empty else said)
        concept_index, style_index, background_index = np.array(places).T
        latents = self.latents[concept_index, style_index, background_index].float()
        return latents, torch.from_numpy(encode(self.tokenizer, sentences))


def corpus_of(folder: Path) -> tuple[Corpus, float]:
    """The corpus of FOLDER/latents.npz, and its scale factor."""
    with np.load(folder / "latents.npz") as arrays:
        scale_factor = float(arrays["scale_factor"])
        latents = torch.from_numpy(arrays["latents"]) * scale_factor
    concepts = read_concepts()
    return Corpus(latents, concepts, held_out(len(concepts)), build_tokenizer(concepts)), scale_factor

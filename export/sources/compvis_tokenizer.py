"""Tokenizers for checkpoints that carry none: named on the command line, or beside the checkpoint."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from latentedge.export.model import TokenizerSource
from latentedge.export.sources.tokenizers import load_tokenizer
from latentedge.runtime.errors import LatentEdgeError

CLIP_END = "<|endoftext|>"


@dataclass(frozen=True)
class TokenizerNeed:
    """What a text encoder takes: its kind ("bert", "clip", "open_clip"), number of tokens, size of its vocabulary."""

    kind: str
    length: int
    vocabulary: int


def find_tokenizer(folder: Path, named: str | None, need: TokenizerNeed) -> TokenizerSource | None:
    """The tokenizer ``named`` on the command line (folder, file or hub id), else the one beside the checkpoint.

    ``None`` when there is none; ``LatentEdgeError`` when it was named and cannot be had, or does not fit.
    """
    place = _beside(folder) if named is None else _inside(Path(named))
    if place is None:
        return None
    origin: Path | str = named if named is not None and not place.exists() else place
    kind = "bert" if need.kind == "bert" else "clip"
    source = load_tokenizer(origin, kind, need.length, _padding(place, need))
    largest = max(Tokenizer.from_str(source.json).get_vocab(with_added_tokens=True).values())
    if largest >= need.vocabulary:
        raise LatentEdgeError(
            f"the tokenizer {origin} numbers its tokens up to {largest}; the text encoder knows {need.vocabulary}.",
            hint="it is another model's tokenizer: name the one that the model was trained with.",
        )
    return _padded_with_zeros(source) if need.kind == "open_clip" else source


def _padded_with_zeros(source: TokenizerSource) -> TokenizerSource:
    """As open_clip pads. Its token 0 is "!", which stays an ordinary token in a text."""
    tokenizer = Tokenizer.from_str(source.json)
    tokenizer.enable_padding(length=source.length, pad_id=0, pad_token=tokenizer.id_to_token(0))
    golden = {prompt: tuple(tokenizer.encode(prompt).ids) for prompt in source.golden}
    return TokenizerSource(tokenizer.to_str(), source.length, golden)


def _beside(folder: Path) -> Path | None:
    places = (folder / "tokenizer.json", folder / "tokenizer")
    return next((_inside(place) for place in places if place.exists()), None)


def _inside(place: Path) -> Path:
    """A folder's ``tokenizer`` folder, as diffusers lays a model out, where the folder itself holds no tokenizer."""
    nested = place / "tokenizer"
    return nested if nested.is_dir() and not (place / "tokenizer.json").exists() else place


def _padding(place: Path, need: TokenizerNeed) -> str | None:
    """The token that the model was trained to be padded with, where it is not the tokenizer's own choice."""
    if need.kind == "open_clip":
        return CLIP_END
    file = place / "tokenizer.json" if place.is_dir() else place
    if file.suffix != ".json" or not file.is_file():
        return None
    try:
        padding = json.loads(file.read_text(encoding="utf-8")).get("padding")
    except (UnicodeDecodeError, json.JSONDecodeError, AttributeError):
        # load_tokenizer says what is wrong with the file.
        return None
    return None if padding is None else str(padding["pad_token"])

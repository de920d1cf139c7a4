"""What the pictures are called: concepts, styles, backgrounds, and the sentences made of them."""

from __future__ import annotations

import string
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

HERE = Path(__file__).parent
STYLES = ("flat", "3d", "noto")
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (255, 255, 255),
    "grey": (138, 144, 152),
    "black": (26, 26, 30),
    "red": (212, 62, 68),
    "orange": (245, 150, 66),
    "yellow": (250, 218, 94),
    "green": (86, 170, 98),
    "blue": (74, 124, 214),
    "purple": (136, 84, 190),
    "pink": (247, 168, 196),
}
# What a caption means that names no style or no background.
DEFAULT_STYLE = "3d"
DEFAULT_BACKGROUND = "white"
TOKENS = 16
SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")


@dataclass(frozen=True)
class Concept:
    """One thing that the model draws: its emojibase label, and all names that captions use for it."""

    label: str
    names: tuple[str, ...]


def read_concepts(path: Path = HERE / "concepts.txt") -> list[Concept]:
    """The concepts in file order; a line is ``label`` or ``label = name, name``."""
    concepts = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line or line.startswith("#"):
            continue
        label, _, others = line.partition(" = ")
        names = [label, *(other for other in others.split(", ") if other)]
        concepts.append(Concept(label, tuple(name.replace("’", "'") for name in names)))
    return concepts


def caption(name: str, style: str | None, background: str | None) -> str:
    """The full form of a caption: "red heart, flat, on a blue background"; either clause may be left out."""
    style_clause = f", {style}" if style else ""
    article = "an" if background and background[0] in "aeiou" else "a"
    background_clause = f", on {article} {background} background" if background else ""
    return name + style_clause + background_clause


def random_caption(concept: Concept, style: str, background: str, random: np.random.Generator) -> str:
    """One of the ways to say the same picture. The defaults' clauses are left out half of the time."""
    name = concept.names[0] if random.random() < 0.6 else concept.names[random.integers(len(concept.names))]
    said_style = None if style == DEFAULT_STYLE and random.random() < 0.5 else style
    said_background = None if background == DEFAULT_BACKGROUND and random.random() < 0.5 else background
    if said_style and random.random() < 0.2:
        return caption(f"{said_style} {name}", None, said_background)
    return caption(name, said_style, said_background)


def build_tokenizer(concepts: list[Concept]) -> Tokenizer:
    """A lower-casing word-piece tokenizer that pads and cuts to ``TOKENS``.

    Every word of a caption is one piece; other words fall into characters. The vocabulary is listed, not trained:
    the library's trainer breaks ties differently in each process, and a resumed run needs the same ids.
    """
    normalizer, pre_tokenizer = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
    sentences = [caption(name, None, None) for concept in concepts for name in concept.names]
    sentences += [caption("a", style, background) for style in STYLES for background in BACKGROUNDS]
    words = {
        word for sentence in sentences for word, _ in pre_tokenizer.pre_tokenize_str(normalizer.normalize_str(sentence))
    }
    characters = sorted(set(string.ascii_lowercase + string.digits).union(*words))
    pieces = [*SPECIAL_TOKENS, *characters, *(f"##{one}" for one in characters), *sorted(words.difference(characters))]
    numbers = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordPiece(numbers, unk_token="[UNK]"))
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, pre_tokenizer
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", numbers["[SEP]"]), ("[CLS]", numbers["[CLS]"]))
    tokenizer.enable_padding(length=TOKENS, pad_id=0, pad_token="[PAD]")
    tokenizer.enable_truncation(TOKENS)
    return tokenizer


def encode(tokenizer: Tokenizer, sentences: list[str]) -> np.ndarray:
    """Token ids, int64 [sentences, TOKENS]."""
    return np.array([encoding.ids for encoding in tokenizer.encode_batch(sentences)], dtype=np.int64)

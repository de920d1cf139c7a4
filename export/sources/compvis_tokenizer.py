"""Tokenizers for checkpoints that carry none: from a folder, a tokenizer.json, or a hub id."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from latentedge.export.model import TokenizerSource
from latentedge.runtime.errors import LatentEdgeError, UsageError

#: Prompts whose ids are recorded, so that a bundle's tokenizer can be checked wherever it runs.
GOLDEN_PROMPTS = (
    "",
    "a photograph of an astronaut riding a horse",
    "Two Words, 3 numbers & punctuation!",
    "a prompt that is longer than any text encoder reads " * 12,
)
CLIP_START, CLIP_END = "<|startoftext|>", "<|endoftext|>"
#: Token that fills up to the length where the tokenizer does not say: "bert", "clip" (transformers), "open_clip".
PADDING = {"bert": ("[PAD]", "<pad>"), "clip": (CLIP_END,), "open_clip": ("!",)}


@dataclass(frozen=True)
class TokenizerNeed:
    """What a text encoder takes: its kind (a key of ``PADDING``), number of tokens, and size of its vocabulary."""

    kind: str
    length: int
    vocabulary: int


def find_tokenizer(folder: Path, named: str | None, need: TokenizerNeed) -> TokenizerSource | None:
    """The tokenizer ``named`` on the command line (folder, file or hub id), else the one beside the checkpoint.

    ``None`` when there is none; ``LatentEdgeError`` when it was named and cannot be had, or does not fit.
    """
    if named is not None:
        place = Path(named)
        tokenizer = read_tokenizer(place, need) if place.exists() else _from_hub(named)
        origin = named
    else:
        beside = [folder / "tokenizer.json", folder / "tokenizer" / "tokenizer.json", folder / "tokenizer"]
        there = [place for place in beside if place.exists()]
        if not there:
            return None
        tokenizer, origin = read_tokenizer(there[0], need), str(there[0])
    return tokenizer_source(tokenizer, need, origin)


def tokenizer_source(tokenizer: Tokenizer, need: TokenizerNeed, origin: str) -> TokenizerSource:
    """``tokenizer`` with padding and truncation set to the encoder's length, and recorded ids."""
    size = tokenizer.get_vocab_size(with_added_tokens=True)
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values())
    if largest >= need.vocabulary:
        raise LatentEdgeError(
            f"the tokenizer {origin} has {size} tokens, numbered up to {largest}; the text encoder knows "
            f"{need.vocabulary}.",
            hint="it is another model's tokenizer: name the one that the model was trained with.",
        )
    token = _padding_token(tokenizer, need, origin)
    tokenizer.enable_padding(length=need.length, pad_id=tokenizer.token_to_id(token), pad_token=token)
    tokenizer.enable_truncation(max_length=need.length)
    golden = {prompt: tuple(tokenizer.encode(prompt).ids) for prompt in GOLDEN_PROMPTS}
    return TokenizerSource(tokenizer.to_str(), need.length, golden)


def read_tokenizer(place: Path, need: TokenizerNeed) -> Tokenizer:
    """A tokenizer.json; or a folder with one, BERT's ``vocab.txt``, or CLIP's ``vocab.json`` and ``merges.txt``."""
    folder = place if place.is_dir() else place.parent
    file = folder / "tokenizer.json" if place.is_dir() else place
    if not file.is_file() and (folder / "tokenizer").is_dir():
        return read_tokenizer(folder / "tokenizer", need)
    try:
        if file.is_file():
            return Tokenizer.from_file(str(file))
        if (folder / "vocab.txt").is_file():
            return bert_tokenizer(folder)
        if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
            return clip_tokenizer(folder)
    except Exception as error:
        raise LatentEdgeError(f"the tokenizer in {place} cannot be read: {error}.") from error
    raise UsageError(
        f"{place} holds no tokenizer.",
        hint="expected tokenizer.json, or vocab.txt (BERT), or vocab.json with merges.txt (CLIP).",
    )


def _from_hub(identifier: str) -> Tokenizer:
    try:
        return Tokenizer.from_pretrained(identifier)
    except Exception as error:
        raise LatentEdgeError(
            f"there is no folder {identifier}, and no tokenizer of this name could be loaded from the hub: "
            f"{' '.join(str(error).split())}.",
            hint="pass a folder with tokenizer.json, or leave --tokenizer out: the bundle then takes token ids only.",
        ) from error


def bert_tokenizer(folder: Path) -> Tokenizer:
    """BERT's word pieces from ``vocab.txt``; lower-cased unless ``tokenizer_config.json`` says otherwise."""
    options: dict[str, Any] = {}
    if (folder / "tokenizer_config.json").is_file():
        options = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    lines = (folder / "vocab.txt").read_text(encoding="utf-8").splitlines()
    vocabulary = {word: number for number, word in enumerate(lines)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=bool(options.get("do_lower_case", True)))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[(name, vocabulary[name]) for name in ("[CLS]", "[SEP]")]
    )
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(
        [name for name in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]") if name in vocabulary]
    )
    return tokenizer


def clip_tokenizer(folder: Path) -> Tokenizer:
    """CLIP's byte pairs from ``vocab.json`` and ``merges.txt``, with transformers' rules for its fast tokenizer."""
    vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
    pairs = [line.split() for line in lines if line and not line.startswith("#version")]
    merges = [(left, right) for left, right in pairs]
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges, unk_token=CLIP_END, end_of_word_suffix="</w>", continuing_subword_prefix="")
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    words = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    start, end = ((name, vocabulary[name]) for name in (CLIP_START, CLIP_END))
    tokenizer.post_processor = processors.RobertaProcessing(end, start, False, False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in (CLIP_START, CLIP_END)])
    return tokenizer


def _padding_token(tokenizer: Tokenizer, need: TokenizerNeed, origin: str) -> str:
    if tokenizer.padding is not None:
        return str(tokenizer.padding["pad_token"])
    for token in PADDING[need.kind]:
        for form in (token, f"{token}</w>"):
            if tokenizer.token_to_id(form) is not None:
                return form
    raise LatentEdgeError(
        f"the tokenizer {origin} has no padding token: expected {' or '.join(PADDING[need.kind])}.",
        hint="set padding in its tokenizer.json, as the model was trained.",
    )

"""Tokenizers as one ``tokenizer.json`` each: CLIP's byte-pair encoding and BERT's word pieces.

Where transformers is installed its own tokenizer is the one that is written; without it the vocabulary files are read
here. Either way the bundle records the ids of a few prompts, so that a device can compare.
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from latentedge.export.model import TokenizerSource
from latentedge.runtime.errors import LatentEdgeError, MissingDependencyError, UsageError

GOLDEN_PROMPTS = (
    "",
    "a photo of an astronaut riding a horse on mars",
    "Blurry,  LOW quality; Café-naïve 42% (text watermark!!)",
    "ein Bär 猫 and 🐱, don't they've",
    "a very long prompt about mountains, rivers and clouds in the evening light " * 8,
)
VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt")
KINDS = ("clip", "bert", "auto")
PAD_TOKENS = {"clip": "<|endoftext|>", "bert": "[PAD]"}
CLIP_BEGIN, CLIP_END = "<|startoftext|>", "<|endoftext|>"
#: OpenAI's file holds 48,894 merges after its first line; what follows them is not used (openai/CLIP, simple_tokenizer).
CLIP_MERGES = 49152 - 256 - 2
CLIP_PATTERN = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def load_tokenizer(source: Path | str, kind: str, length: int, pad: str | None = None) -> TokenizerSource:
    """A tokenizer that pads and truncates to ``length`` tokens.

    ``source`` is a folder with ``tokenizer.json``, ``vocab.json`` and ``merges.txt``, or ``vocab.txt``; one of these
    files; CLIP's ``bpe_simple_vocab_16e6.txt.gz``; or a hub id. ``kind`` is "clip", "bert" or "auto" (told by the
    files). ``pad`` overrides the padding token that the source names. :class:`LatentEdgeError` where there is no
    tokenizer or its pieces do not fit together.
    """
    if kind not in KINDS:
        raise UsageError(f"{kind!r} is no kind of tokenizer; known are: {', '.join(KINDS)}.")
    path = Path(source)
    if not path.exists():
        return _from_transformers(_pretrained(str(source)), length, pad)
    folder = path if path.is_dir() else path.parent
    # Without a vocabulary transformers makes an empty tokenizer of the settings.
    described = (folder / "tokenizer_config.json").is_file() and any((folder / name).is_file() for name in VOCABULARIES)
    original = _original(path) if described else None
    if original is not None:
        return _from_transformers(original, length, pad)
    tokenizer, found = read_files(path, kind)
    token = pad or _named_pad(folder) or PAD_TOKENS[found]
    return _finished(tokenizer, length, token, {})


def read_files(path: Path, kind: str) -> tuple[Tokenizer, str]:
    """A tokenizer without padding, read from its files alone, and its kind: "clip" or "bert"."""
    files = {file.name: file for file in ([path] if path.is_file() else sorted(path.iterdir()))}
    try:
        if "tokenizer.json" in files:
            tokenizer = Tokenizer.from_file(str(files["tokenizer.json"]))
            return tokenizer, "bert" if isinstance(tokenizer.model, models.WordPiece) else "clip"
        if kind in ("clip", "auto") and "vocab.json" in files:
            vocabulary = json.loads(files["vocab.json"].read_text(encoding="utf-8"))
            return _clip(vocabulary, _merges(files["vocab.json"].with_name("merges.txt"))), "clip"
        if kind in ("bert", "auto") and "vocab.txt" in files:
            return _bert(files["vocab.txt"]), "bert"
        packed = [file for name, file in files.items() if name.startswith("bpe_simple_vocab") and name.endswith(".gz")]
        if kind in ("clip", "auto") and packed:
            return _clip_from_merges(packed[0]), "clip"
    except (OSError, ValueError, KeyError) as error:
        raise LatentEdgeError(f"the tokenizer in {path} is damaged: {error}.", hint="copy it again") from error
    except Exception as error:
        # The tokenizers library raises plain Exception for files that it cannot read.
        raise LatentEdgeError(f"the tokenizer in {path} cannot be read: {error}.", hint="copy it again") from error
    raise LatentEdgeError(
        f"{path} holds no {'' if kind == 'auto' else kind + ' '}tokenizer.",
        hint="expected tokenizer.json, or vocab.json and merges.txt (CLIP), or vocab.txt (BERT)",
    )


def _merges(path: Path) -> list[tuple[str, str]]:
    lines = path.read_text(encoding="utf-8").splitlines()
    return [_pair(line) for line in lines if line.strip() and not line.startswith("#version")]


def _pair(line: str) -> tuple[str, str]:
    left, right = line.split()
    return left, right


def _clip(vocabulary: dict[str, int], merges: list[tuple[str, str]]) -> Tokenizer:
    """CLIP's byte-pair encoding: NFC, one space for many, lower case; words end in ``</w>``."""
    model = models.BPE(
        vocab=vocabulary,
        merges=merges,
        continuing_subword_prefix="",
        end_of_word_suffix="</w>",
        fuse_unk=False,
        unk_token=CLIP_END,
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(CLIP_PATTERN), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in (CLIP_BEGIN, CLIP_END)])
    tokenizer.post_processor = processors.RobertaProcessing(
        (CLIP_END, vocabulary[CLIP_END]),
        (CLIP_BEGIN, vocabulary[CLIP_BEGIN]),
        trim_offsets=False,
        add_prefix_space=False,
    )
    return tokenizer


def _clip_from_merges(path: Path) -> Tokenizer:
    """CLIP's tokenizer from OpenAI's list of merges: ids are bytes, bytes that end a word, merges, special tokens."""
    with gzip.open(path, "rt", encoding="utf-8") as stream:
        lines = stream.read().split("\n")
    merges = [_pair(line) for line in lines[1 : CLIP_MERGES + 1]]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *(left + right for left, right in merges)]
    tokens += [CLIP_BEGIN, CLIP_END]
    return _clip({token: number for number, token in enumerate(tokens)}, merges)


def _bert(path: Path) -> Tokenizer:
    """BERT's word pieces; ``do_lower_case`` of the folder's ``tokenizer_config.json`` counts, else lower case."""
    settings = path.with_name("tokenizer_config.json")
    lower = json.loads(settings.read_text(encoding="utf-8")).get("do_lower_case", True) if settings.is_file() else True
    vocabulary = {token: number for number, token in enumerate(path.read_text(encoding="utf-8").splitlines())}
    tokenizer = Tokenizer(models.WordPiece(vocab=vocabulary, unk_token="[UNK]", max_input_chars_per_word=100))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=bool(lower))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    special = [token for token in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]") if token in vocabulary]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B [SEP]",
        special_tokens=[(token, vocabulary[token]) for token in ("[CLS]", "[SEP]")],
    )
    return tokenizer


def _named_pad(folder: Path) -> str | None:
    """The padding token that a folder's ``tokenizer_config.json`` or ``special_tokens_map.json`` names."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        file = folder / name
        if file.is_file():
            token = json.loads(file.read_text(encoding="utf-8")).get("pad_token")
            token = token.get("content") if isinstance(token, dict) else token
            if token:
                return str(token)
    return None


def _original(path: Path) -> Any:
    """transformers' tokenizer for a folder, or ``None`` without transformers or where it needs more files."""
    try:
        return _pretrained(str(path if path.is_dir() else path.parent))
    except MissingDependencyError:
        return None


def _pretrained(name: str) -> Any:
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise MissingDependencyError(
            f"{name} is no folder or file here; to read a tokenizer by its hub id, transformers is needed: {error}.",
            hint="pip install 'latentedge[diffusers]', or give the tokenizer's folder",
        ) from error
    try:
        return AutoTokenizer.from_pretrained(name)
    except Exception as error:
        # The library lets errors of the hub, of JSON and of its own through, of no common class.
        raise LatentEdgeError(
            f"the tokenizer {name} cannot be loaded: {(str(error).splitlines() or [''])[0]}",
            hint="give a folder with tokenizer.json, vocab.json and merges.txt, or vocab.txt",
        ) from error


def _from_transformers(original: Any, length: int, pad: str | None) -> TokenizerSource:
    if not original.is_fast:
        raise LatentEdgeError(f"{type(original).__name__} has no tokenizer.json form.", hint="give a fast tokenizer")
    if pad is not None:
        original.pad_token = pad
    golden = {}
    for prompt in GOLDEN_PROMPTS:
        ids = original(prompt, padding="max_length", max_length=length, truncation=True).input_ids
        golden[prompt] = tuple(int(number) for number in ids)
    tokenizer = Tokenizer.from_str(original.backend_tokenizer.to_str())
    return _finished(tokenizer, length, str(original.pad_token), golden)


def _finished(tokenizer: Tokenizer, length: int, pad: str, golden: dict[str, tuple[int, ...]]) -> TokenizerSource:
    """Set padding and truncation, record ids, and compare them with the original's where there is one."""
    number = tokenizer.token_to_id(pad)
    if number is None:
        raise LatentEdgeError(f"the tokenizer has no token {pad!r} to pad with.")
    # As in transformers, a padding token is special: in a text it is never split or joined to a word.
    tokenizer.add_special_tokens([AddedToken(pad, normalized=False)])
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length, pad_id=number, pad_token=pad)
    recorded = {prompt: tuple(tokenizer.encode(prompt).ids) for prompt in GOLDEN_PROMPTS}
    for prompt, ids in golden.items():
        if recorded[prompt] != ids:
            raise LatentEdgeError(
                f"the tokenizer.json gives other ids than the original tokenizer for {prompt[:40]!r}: "
                f"{recorded[prompt][:8]}, expected {ids[:8]}."
            )
    return TokenizerSource(tokenizer.to_str(), length, recorded)

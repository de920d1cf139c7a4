"""Prompts to token ids, with the tokenizer.json that the export wrote."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from tokenizers import Tokenizer

from latentedge.runtime.bundle import Array, Bundle
from latentedge.runtime.errors import BundleError, UsageError


class PromptTokenizer:
    """A tokenizer of the bundle. Padding, truncation and special tokens live in its tokenizer.json."""

    def __init__(self, bundle: Bundle, name: str) -> None:
        record = bundle.manifest.tokenizers.get(name)
        if record is None:
            raise UsageError(
                "this bundle has no tokenizer, so it cannot read a prompt.",
                hint="pass prompt_ids, with guidance negative_prompt_ids too, or export again with `--tokenizer DIR|ID`",
            )
        path = bundle.file(record.path)
        try:
            self._tokenizer = _loaded(str(path), path.stat().st_mtime_ns)
        except Exception as error:
            raise BundleError(f"{path} is no tokenizer: {error}.", hint="export the checkpoint again") from error
        self.length = record.length

    def encode(self, prompts: Sequence[str]) -> Array:
        """Token ids, int64 ``[len(prompts), length]``; :class:`UsageError` names characters it does not know."""
        encodings = self._tokenizer.encode_batch(list(prompts))
        for prompt, encoding in zip(prompts, encodings, strict=True):
            self._check_characters(prompt, encoding.tokens, encoding.offsets)
        return np.array([encoding.ids for encoding in encodings], np.int64)

    def _check_characters(self, prompt: str, tokens: Sequence[str], offsets: Sequence[tuple[int, int]]) -> None:
        unknown_token = getattr(self._tokenizer.model, "unk_token", None)
        words = [
            prompt[start:end] for token, (start, end) in zip(tokens, offsets, strict=True) if token == unknown_token
        ]
        unknown = sorted({character for word in words for character in word if not self._knows(character)})
        if unknown:
            raise UsageError(
                f"the tokenizer of this model has no token for {' '.join(map(repr, unknown))} in the prompt {prompt!r}.",
                hint="leave the characters out or spell them in words",
            )

    def _knows(self, character: str) -> bool:
        normalizer = self._tokenizer.normalizer
        plain = normalizer.normalize_str(character) if normalizer is not None else character
        pieces = (form for symbol in plain for form in (symbol, f"##{symbol}", f"{symbol}</w>"))
        return not plain.strip() or any(self._tokenizer.token_to_id(piece) is not None for piece in pieces)


@lru_cache(maxsize=4)
def _loaded(path: str, changed: int) -> Tokenizer:
    """The tokenizer of a file, read once; ``changed`` (nanoseconds) tells another state of the file apart."""
    return Tokenizer.from_file(path)

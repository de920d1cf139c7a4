"""Prompts to token ids, and characters that a tokenizer does not know."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from latentedge.runtime.bundle import Bundle, TokenizerFile, file_sha256
from latentedge.runtime.errors import BundleError, UsageError
from latentedge.runtime.tokenizer import PromptTokenizer
from tests import tiny_bundles

WORDS = ["[PAD]", "[UNK]", "r", "##e", "##d", "red", "heart", "e", "d"]


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    """Word pieces in lower case, padded and cut to four tokens."""
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.enable_padding(length=4, pad_id=0, pad_token="[PAD]")
    tokenizer.enable_truncation(4)
    path = tmp_path / "tokenizer.json"
    tokenizer.save(str(path))
    record = TokenizerFile("tokenizer.json", file_sha256(path), 4)
    return tiny_bundles.write_bundle(tmp_path, tokenizers={"tokenizer": record})


def test_prompts_become_rows_of_ids(bundle: Bundle) -> None:
    tokenizer = PromptTokenizer(bundle, "tokenizer")
    ids = tokenizer.encode(["Red heart", "rede red red red red"])
    assert ids.tolist() == [[5, 6, 0, 0], [5, 3, 5, 5]]
    assert str(ids.dtype) == "int64"
    assert tokenizer.length == 4


def test_unknown_characters_are_named_and_known_ones_are_not(bundle: Bundle) -> None:
    with pytest.raises(UsageError, match=r"no token for 'ß' '♥' in the prompt 'red ♥ Rß'"):
        PromptTokenizer(bundle, "tokenizer").encode(["red", "red ♥ Rß"])


def test_a_word_of_known_characters_may_be_unknown(bundle: Bundle) -> None:
    """The model has a token for such words; nothing in the prompt could be left out."""
    assert PromptTokenizer(bundle, "tokenizer").encode(["dr"]).tolist() == [[1, 0, 0, 0]]


def test_a_missing_and_a_broken_tokenizer_are_errors(bundle: Bundle) -> None:
    with pytest.raises(UsageError, match="has no tokenizer"):
        PromptTokenizer(bundle, "tokenizer_2")
    (bundle.path / "tokenizer.json").write_text("{}")
    with pytest.raises(BundleError, match="is no tokenizer"):
        PromptTokenizer(bundle, "tokenizer")

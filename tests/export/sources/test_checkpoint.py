"""Checkpoints are read without executing anything from them, and damage is named."""

from __future__ import annotations

import enum
import functools
import os
import pickle
import zipfile
from collections import OrderedDict, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from latentedge.export.sources.checkpoint import check_fit, load_network, open_checkpoint  # noqa: E402
from latentedge.runtime.bundle import file_sha256  # noqa: E402
from latentedge.runtime.errors import LatentEdgeError, UsageError  # noqa: E402

VARIANTS = Path(__file__).parents[2] / "golden" / "compvis" / "pickle_variants"


@pytest.mark.parametrize("name", sorted(file.name for file in VARIANTS.glob("*.ckpt")))
def test_every_pickle_variant_gives_the_same_tensors(name: str) -> None:
    checkpoint = open_checkpoint(VARIANTS / name)
    assert checkpoint.sha256 == file_sha256(VARIANTS / name)
    with np.load(VARIANTS / "tensors.npz") as expected:
        assert set(expected.files) == set(checkpoint.shapes)
        for key in expected.files:
            found = checkpoint.tensor(key)
            assert tuple(found.shape) == checkpoint.shapes[key] == expected[key].shape
            wanted = torch.from_numpy(expected[key])
            if name == "half.ckpt" and wanted.is_floating_point():
                assert checkpoint.dtypes[key] == torch.float16
                wanted = wanted.half()
            assert torch.equal(found, wanted)


def test_callback_classes_are_named_and_not_imported() -> None:
    checkpoint = open_checkpoint(VARIANTS / "pl_callbacks.ckpt")
    assert checkpoint.replaced == ("pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",)


class Harmful:
    """Unpickling runs ``command``."""

    def __init__(self, command: Any, *arguments: Any) -> None:
        self.call = (command, arguments)

    def __reduce__(self) -> Any:
        return self.call


class Callback:
    """A class that only this file knows."""

    def __init__(self) -> None:
        self.state = {"best": 1.0}


def test_code_in_a_checkpoint_is_not_executed(tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    weights = {"weight": torch.ones(2)}
    for number, harmful in enumerate(
        (Harmful(eval, f"open({str(marker)!r}, 'w').close()"), Harmful(os.system, f"touch {marker}"))
    ):
        file = tmp_path / f"harmful{number}.ckpt"
        torch.save({"state_dict": weights, "callbacks": {"x": harmful}}, file)
        # The file is harmful to anyone who trusts it.
        with file.open("rb") as stream:
            torch.load(stream, weights_only=False)
        assert marker.exists()
        marker.unlink()
        checkpoint = open_checkpoint(file)
        assert torch.equal(checkpoint.tensor("weight"), weights["weight"])
        assert checkpoint.replaced == (("builtins.eval",), (f"{os.system.__module__}.system",))[number]
        assert not marker.exists()


@pytest.mark.parametrize("legacy", [False, True])
def test_foreign_objects_beside_the_tensors(tmp_path: Path, legacy: bool) -> None:
    file = tmp_path / "model.ckpt"
    content = {"state_dict": OrderedDict(weight=torch.ones(2)), "callbacks": {Callback: Callback()}, "epoch": 3}
    torch.save(content, file, _use_new_zipfile_serialization=not legacy)
    checkpoint = open_checkpoint(file)
    assert torch.equal(checkpoint.tensor("weight"), torch.ones(2))
    assert len(checkpoint.replaced) == 1
    assert checkpoint.replaced[0].endswith("Callback")


class Settings(dict[str, Any]):
    """A dictionary with a class of its own, as Lightning keeps hyperparameters."""


class Names(list[str]):
    """A list with a class of its own."""


class Kind(enum.Enum):
    FIRST = "first"


#: What training leaves beside the weights.
LEFT: dict[str, Any] = {
    "settings": Settings(rate=1e-4, inner=Settings(steps=3)),
    "names": Names(["a", "b"]),
    "kind": Kind.FIRST,
    "defaults": defaultdict(list, {"a": [1]}),
    "version": torch.__version__,
    "optimizer": torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))]),
    "module": torch.nn.Linear(2, 2),
    "class": torch.nn.Linear,
    "function": torch.nn.functional.relu,
    "partial": functools.partial(os.path.join, "a"),
    "array": np.ones((2, 2)),
    "state": np.random.default_rng(0),
    "path": Path("here"),
    "numbers": {1, 2},
    "range": range(3),
    "complex": 1j,
    "device": torch.device("cuda:0"),
}


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("name", LEFT)
def test_what_training_leaves_beside_the_weights(tmp_path: Path, name: str, legacy: bool) -> None:
    file = tmp_path / "model.ckpt"
    content = {"state_dict": {"weight": torch.arange(3.0), "kept": LEFT[name]}, "left": {Callback: LEFT[name]}}
    torch.save(content, file, _use_new_zipfile_serialization=not legacy)
    assert torch.equal(open_checkpoint(file).tensor("weight"), torch.arange(3.0))


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("protocol", range(1, pickle.HIGHEST_PROTOCOL + 1))
def test_every_binary_protocol(tmp_path: Path, protocol: int, legacy: bool) -> None:
    file = tmp_path / "model.ckpt"
    content = {"state_dict": {"weight": torch.arange(3.0)}, "callbacks": {Callback: Callback()}}
    torch.save(content, file, pickle_protocol=protocol, _use_new_zipfile_serialization=not legacy)
    checkpoint = open_checkpoint(file)
    assert torch.equal(checkpoint.tensor("weight"), torch.arange(3.0))
    assert [name.rpartition(".")[2] for name in checkpoint.replaced] == ["Callback"]


def test_a_checkpoint_cannot_change_torch(tmp_path: Path) -> None:
    whole, changing = tmp_path / "whole.ckpt", tmp_path / "changing.ckpt"
    torch.save({"state_dict": {"weight": torch.ones(2)}}, whole)
    # Names a function, sets its __defaults__ to (7,), and drops it: c names, X and K are text and number, b sets.
    setting = b"ctorch._utils\n_rebuild_parameter\nN}X\x0c\0\0\0__defaults__K\x07\x85s\x86b0"
    with zipfile.ZipFile(whole) as source, zipfile.ZipFile(changing, "w") as target:
        for name in source.namelist():
            record = source.read(name)
            target.writestr(name, record[:2] + setting + record[2:] if name.endswith("data.pkl") else record)
    with pytest.raises(LatentEdgeError, match="cannot be read"):
        open_checkpoint(changing)
    assert torch._utils._rebuild_parameter.__defaults__ is None


def test_views_and_parameters_keep_their_values(tmp_path: Path) -> None:
    numbers = torch.arange(10.0)
    expected = {
        "slice": numbers[2:5],
        "transposed": numbers.view(2, 5).t(),
        "expanded": numbers[:1].expand(4),
        "parameter": torch.nn.Parameter(numbers.clone()),
        "bfloat": numbers.bfloat16(),
        "scalar": torch.ones(()),
    }
    file = tmp_path / "model.ckpt"
    torch.save({"state_dict": expected}, file)
    checkpoint = open_checkpoint(file)
    assert set(checkpoint.shapes) == set(expected)
    for name, value in expected.items():
        assert torch.equal(checkpoint.tensor(name), value), name


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
@pytest.mark.parametrize("kept", [0, 1, 100, 0.5, 0.99])
def test_truncated_files_are_named(tmp_path: Path, suffix: str, kept: float) -> None:
    from safetensors.torch import save_file

    file = tmp_path / f"model{suffix}"
    tensors = {"weight": torch.randn(64, 64)}
    if suffix == ".ckpt":
        torch.save({"state_dict": tensors}, file)
    else:
        save_file(tensors, file)
    whole = file.read_bytes()
    file.write_bytes(whole[: int(len(whole) * kept) if isinstance(kept, float) else kept])
    with pytest.raises(LatentEdgeError, match="cannot be read as a checkpoint") as caught:
        open_checkpoint(file)
    assert caught.value.hint is not None
    assert caught.value.exit_code == 1


def test_truncated_legacy_file(tmp_path: Path) -> None:
    file = tmp_path / "model.ckpt"
    whole = (VARIANTS / "legacy_nonzip.ckpt").read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(LatentEdgeError, match="cannot be read"):
        open_checkpoint(file)


def test_files_that_are_no_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no checkpoint"):
        open_checkpoint(tmp_path / "absent.ckpt")
    text = tmp_path / "notes.txt"
    text.write_text("hello")
    with pytest.raises(UsageError, match="ending in"):
        open_checkpoint(text)
    page = tmp_path / "page.ckpt"
    page.write_text("<!DOCTYPE html><html>not found</html>")
    with pytest.raises(LatentEdgeError, match="cannot be read"):
        open_checkpoint(page)
    archive = tmp_path / "archive.ckpt"
    with zipfile.ZipFile(archive, "w") as opened:
        opened.writestr("readme", "nothing here")
    with pytest.raises(LatentEdgeError, match=r"no data\.pkl"):
        open_checkpoint(archive)
    numbers = tmp_path / "numbers.ckpt"
    torch.save({"epoch": 3, "step": 4}, numbers)
    with pytest.raises(LatentEdgeError, match=r"holds no tensors.*epoch, step"):
        open_checkpoint(numbers)
    program = tmp_path / "program.ckpt"
    with zipfile.ZipFile(program, "w") as opened:
        for record in ("data.pkl", "constants.pkl", "code/__torch__.py"):
            opened.writestr(f"program/{record}", "")
    with pytest.raises(LatentEdgeError, match="TorchScript program"):
        open_checkpoint(program)


def test_mismatches_are_listed_up_to_ten_with_their_count() -> None:
    expected = {f"a{number:02}": (1,) for number in range(12)} | {"same": (2,), "shape": (3, 4)}
    found = {"b": (1,), "same": (2,), "shape": (4, 3)}
    with pytest.raises(LatentEdgeError) as caught:
        check_fit(expected, found, "model.ckpt", "config.yaml")
    message = caught.value.message
    assert "12 missing: a00, a01, a02, a03, a04, a05, a06, a07, a08, a09 and 2 more" in message
    assert "a10" not in message
    assert "1 unexpected: b" in message
    assert "1 of another shape: shape (expected [3, 4], found [4, 3])" in message
    assert "\n" not in message
    check_fit(found, found, "model.ckpt", "config.yaml")


def test_loading_upcasts_halves_and_keeps_integers(tmp_path: Path) -> None:
    file = tmp_path / "model.ckpt"
    layer = torch.nn.BatchNorm1d(3)
    state = {f"layer.{name}": value for name, value in layer.half().state_dict().items()}
    torch.save({"state_dict": state}, file)
    names = {name: f"layer.{name}" for name in layer.state_dict()}
    loaded = load_network(lambda: torch.nn.BatchNorm1d(3), open_checkpoint(file), names)
    dtypes = {name: value.dtype for name, value in loaded.state_dict().items()}
    assert dtypes["weight"] == torch.float32
    assert dtypes["num_batches_tracked"] == torch.int64
    assert not loaded.training

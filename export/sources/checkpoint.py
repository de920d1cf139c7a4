"""Reading the tensors of a checkpoint without executing anything from it, and fitting them to a network.

Pickled checkpoints are read by an allow-list of functions that put tensors together (``pickles.py``). All other names
in them (a Lightning checkpoint is keyed by callback classes) become stand-ins, never imported or called.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from latentedge.export.sources.pickles import UNREADABLE, read_pickled
from latentedge.runtime.bundle import file_sha256
from latentedge.runtime.errors import LatentEdgeError, UsageError

SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
#: Names that an error lists before it only counts.
LISTED = 10

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint file: digest, shape and dtype of each tensor, and a way to read some of them."""

    path: Path
    sha256: str
    shapes: dict[str, Shape]
    dtypes: dict[str, torch.dtype]
    read: Callable[[Iterable[str]], dict[str, Tensor]]
    #: Names of classes and functions that the file refers to and that were replaced by a stand-in.
    replaced: tuple[str, ...] = ()

    def tensor(self, name: str) -> Tensor:
        """One tensor, in the file's dtype."""
        return self.read([name])[name]


def open_checkpoint(path: Path) -> Checkpoint:
    """Read the table of tensors of a ``.safetensors``, ``.ckpt``, ``.pt``, ``.pth`` or ``.bin`` file.

    Large files are mapped, not loaded. ``LatentEdgeError`` for a truncated, empty or foreign file.
    """
    if not path.is_file():
        raise UsageError(f"there is no checkpoint {path}.")
    if path.suffix not in SUFFIXES:
        raise UsageError(f"{path.name} is no checkpoint: expected a file ending in {', '.join(SUFFIXES)}.")
    reader = _open_safetensors if path.suffix == ".safetensors" else _open_pickled
    return reader(path)


def _unreadable(path: Path, reason: object) -> LatentEdgeError:
    return LatentEdgeError(
        f"{path} cannot be read as a checkpoint ({path.stat().st_size} bytes): {reason}.",
        hint="the file is truncated, harmful or not what its name says: compare its size and SHA-256 with its origin.",
    )


def _open_safetensors(path: Path) -> Checkpoint:
    from safetensors import SafetensorError, safe_open

    def read(names: Iterable[str]) -> dict[str, Tensor]:
        with safe_open(path, framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in names}

    shapes: dict[str, Shape] = {}
    dtypes: dict[str, torch.dtype] = {}
    try:
        with safe_open(path, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - not a mapping
                piece = opened.get_slice(name)
                shapes[name] = tuple(piece.get_shape())
                dtypes[name] = _SAFETENSORS_DTYPES[piece.get_dtype()]
    except (SafetensorError, OSError, KeyError) as error:
        raise _unreadable(path, error) from error
    return Checkpoint(path, file_sha256(path), shapes, dtypes, read)


_SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def _open_pickled(path: Path) -> Checkpoint:
    try:
        content, replaced = read_pickled(path)
    except UNREADABLE as error:
        raise _unreadable(path, _first_line(error)) from error
    tensors = _state_dict(content, path)
    return Checkpoint(
        path,
        file_sha256(path),
        {name: tuple(tensor.shape) for name, tensor in tensors.items()},
        {name: tensor.dtype for name, tensor in tensors.items()},
        lambda names: {name: tensors[name] for name in names},
        replaced,
    )


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


def _state_dict(content: Any, path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint: under ``state_dict``, or the whole file is one."""
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    tensors = {}
    if isinstance(content, Mapping):
        tensors = {str(name): value.detach() for name, value in content.items() if isinstance(value, Tensor)}
    if not tensors:
        found = ", ".join(map(str, list(content)[:LISTED])) if isinstance(content, Mapping) else type(content).__name__
        raise LatentEdgeError(
            f"{path} holds no tensors: expected a state dict, maybe under state_dict; found {found or 'nothing'}.",
            hint="save the model's state_dict(), not the model.",
        )
    return tensors


def _listing(names: Iterable[str]) -> str:
    ordered = sorted(names)
    shown = ", ".join(ordered[:LISTED])
    return shown if len(ordered) <= LISTED else f"{shown} and {len(ordered) - LISTED} more"


def check_fit(expected: Mapping[str, Shape], found: Mapping[str, Shape], weights: str, description: str) -> None:
    """Compare the keys and shapes that a description asks for with those that the weights have.

    ``LatentEdgeError`` lists missing keys, unexpected keys and other shapes, each at most ten and with the count.
    """
    missing = expected.keys() - found.keys()
    unexpected = found.keys() - expected.keys()
    reshaped = [
        f"{name} (expected {list(expected[name])}, found {list(found[name])})"
        for name in expected.keys() & found.keys()
        if tuple(expected[name]) != tuple(found[name])
    ]
    complaints = [
        f"{count} {what}: {listing}"
        for count, what, listing in (
            (len(missing), "missing", _listing(missing)),
            (len(unexpected), "unexpected", _listing(unexpected)),
            (len(reshaped), "of another shape", _listing(reshaped)),
        )
        if count
    ]
    if complaints:
        raise LatentEdgeError(
            f"the weights of {weights} do not fit {description} ({len(expected)} tensors expected): "
            f"{'; '.join(complaints)}.",
            hint="the description belongs to another model: compare channels, depths and first stage with its origin.",
        )


def load_network(build: Callable[[], nn.Module], checkpoint: Checkpoint, names: Mapping[str, str]) -> nn.Module:
    """A network in evaluation mode with float32 weights; ``names`` maps its state-dict names to the file's.

    The network is built without memory for its initial weights. Integer buffers that the file lacks are computed.
    """
    with torch.device("meta"):
        network = build()
    state = {}
    for own, value in network.state_dict().items():
        if own in names:
            state[own] = checkpoint.tensor(names[own]).to(value.dtype)
    _add_position_ids(network, state)
    network.load_state_dict(state, strict=True, assign=True)
    return network.eval().requires_grad_(False)


def _add_position_ids(network: nn.Module, state: dict[str, Tensor]) -> None:
    # Old CLIP files store 0..n-1, newer ones do not, and half-precision ones store them as floats.
    for name, value in network.state_dict().items():
        if name.endswith("position_ids"):
            state[name] = torch.arange(value.shape[-1])[None]

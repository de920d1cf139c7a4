"""Pickles of checkpoints, read by an allow-list: tensors become tensors, all else a stand-in that does nothing.

An unpickler calls what a file names. This one looks names up in a table of functions that only put tensors together,
and takes every other name (callbacks, optimizers, configurations, ``os.system``) for a stand-in, never imported.
"""

from __future__ import annotations

import builtins
import functools
import inspect
import pickle
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import torch

#: All that a file may call, by the names that torch writes.
ALLOWED: dict[str, Any] = {
    "collections.OrderedDict": OrderedDict,
    "torch.Size": torch.Size,
    "torch._utils._rebuild_tensor": torch._utils._rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": torch._utils._rebuild_tensor_v2,
    "torch._utils._rebuild_parameter": torch._utils._rebuild_parameter,
    **{f"torch.{name}": value for name, value in vars(torch).items() if isinstance(value, torch.dtype)},
}
#: Modules whose names are not worth a message: containers, bytes and devices beside the tensors.
PLAIN_MODULES = frozenset({"collections", "copyreg", "_codecs", "torch"})
#: Pickles of protocol 2 hold the names that modules had in Python 2.
PYTHON_2_MODULES = {"__builtin__": "builtins", "copy_reg": "copyreg"}


class StandIn:
    """Stands for any class, function or object of a pickle: takes every argument, item and state, and does nothing."""

    #: torch asks classes of modules in its old format for it.
    dump_patches = False

    def __new__(cls, *arguments: object, **options: object) -> StandIn:
        """An object without the arguments."""
        return super().__new__(cls)

    def __init__(self, *arguments: object, **options: object) -> None:
        pass

    def __call__(self, *arguments: object, **options: object) -> StandIn:
        """What an object gives that the file calls."""
        return self

    def __setstate__(self, state: object) -> None:
        pass

    def __setitem__(self, key: object, value: object) -> None:
        pass

    def append(self, item: object) -> None:
        """As a list's."""

    def extend(self, items: object) -> None:
        """As a list's."""

    def add(self, item: object) -> None:
        """As a set's."""


def read_pickled(path: Path) -> tuple[Any, tuple[str, ...]]:
    """The content of a file that ``torch.save`` wrote, on the CPU, and the names that became stand-ins.

    Zip archives are mapped, not loaded. Raises what unpickling a damaged file raises (``UNREADABLE``).
    """
    zipped = zipfile.is_zipfile(path)
    if zipped:
        _check_archive(path)
    elif _starts_as_zip(path):
        raise EOFError("it begins as a zip archive, and its end is missing")
    replaced: set[str] = set()

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            full = f"{PYTHON_2_MODULES.get(module, module)}.{name}"
            if (allowed := ALLOWED.get(full)) is not None:
                # A file may set attributes of what it names: of functions it gets copies.
                return functools.partial(allowed) if inspect.isfunction(allowed) else allowed
            if not _is_plain(full):
                replaced.add(full)
            return type(StandIn.__name__, (StandIn,), {})

    def load(stream: IO[bytes], **options: Any) -> Any:
        return Unpickler(stream, **options).load()

    reader = SimpleNamespace(Unpickler=Unpickler, load=load, UnpicklingError=pickle.UnpicklingError, __name__=__name__)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        content = torch.load(path, map_location="cpu", weights_only=False, pickle_module=reader, mmap=zipped)
    return content, tuple(sorted(replaced))


#: What reading a truncated, foreign or harmful file raises.
UNREADABLE = (
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    RuntimeError,
    EOFError,
    ValueError,
    LookupError,
    AttributeError,
    TypeError,
    OverflowError,
    MemoryError,
    AssertionError,
)


def _is_plain(full: str) -> bool:
    module, _, name = full.rpartition(".")
    return module in PLAIN_MODULES or (module == "builtins" and isinstance(getattr(builtins, name, None), type))


def _check_archive(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    if not any(name == "data.pkl" or name.endswith("/data.pkl") for name in names):
        raise ValueError("the archive has no data.pkl")
    if any(name == "constants.pkl" or name.endswith("/constants.pkl") for name in names):
        # torch would compile the program in it.
        raise ValueError("it is a TorchScript program, not a table of tensors")


def _starts_as_zip(path: Path) -> bool:
    with path.open("rb") as stream:
        return stream.read(4) == b"PK\x03\x04"

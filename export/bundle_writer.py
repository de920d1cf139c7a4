"""Writing a bundle: aside first, and renamed when everything in it has been proven."""

from __future__ import annotations

import contextlib
import errno
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from latentedge.export.errors import ExportError
from latentedge.export.model import SourceModel, TokenizerSource
from latentedge.export.parity import Case
from latentedge.runtime.bundle import MANIFEST_NAME, Component, Manifest, TokenizerFile, file_sha256
from latentedge.runtime.errors import UsageError

#: Recorded parity vectors of one component take at most about this many bytes, but always hold one case.
VECTOR_BYTES = 200_000
#: transformers' classes that read a ``tokenizer.json``, by its model.
TOKENIZER_CLASSES = {"BPE": "CLIPTokenizerFast", "WordPiece": "BertTokenizerFast"}


@contextlib.contextmanager
def staged(output: Path, *, overwrite: bool) -> Iterator[Path]:
    """A new folder beside ``output`` that becomes ``output`` at the end, or is deleted on any failure or Ctrl-C.

    :class:`UsageError` when ``output`` exists and may not be replaced: without ``overwrite``, or when it is not a
    bundle. :class:`ExportError` when it cannot be written.
    """
    output = output.absolute()
    check_output(output, overwrite=overwrite)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{output.name}.", suffix=".partial", dir=output.parent))
    except OSError as error:
        raise _not_written(output, error) from error
    try:
        # mkdtemp's folder is for its owner only; a bundle is as readable as any other folder.
        folder.chmod(0o755)
        yield folder
        check_output(output, overwrite=overwrite)
        _replace(folder, output)
    except OSError as error:
        file = Path(error.filename or folder)
        if file != output and not file.is_relative_to(folder):
            raise
        raise _not_written(output, error) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _not_written(output: Path, error: OSError) -> ExportError:
    # numpy's writer gives no number.
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, None)
    hint = (
        "a bundle takes about as much as its checkpoint, for each precision: free that much, or choose an -o elsewhere"
        if full
        else "choose an -o in a folder that you may write to"
    )
    return ExportError(f"{output} cannot be written: {error}. Nothing is left of it.", hint=hint)


def check_output(output: Path, *, overwrite: bool) -> None:
    """:class:`UsageError` when something is at ``output`` that may not be replaced."""
    if not output.exists() and not output.is_symlink():
        return
    if not overwrite:
        raise UsageError(f"{output} exists.", hint="choose another -o, or replace it with --overwrite")
    if not output.is_dir() or (any(output.iterdir()) and not (output / MANIFEST_NAME).is_file()):
        raise UsageError(f"{output} is not a bundle, so --overwrite does not replace it.", hint="choose another -o")


def _replace(folder: Path, output: Path) -> None:
    if not output.exists():
        folder.rename(output)
        return
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.", suffix=".old", dir=output.parent) as old:
        output.rename(Path(old) / "bundle")
        try:
            folder.rename(output)
        except OSError:
            (Path(old) / "bundle").rename(output)
            raise


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write ``latentedge.json``."""
    write_json(folder / MANIFEST_NAME, manifest.to_json())


def write_json(path: Path, data: Mapping[str, Any] | list[Any]) -> None:
    """Write JSON that any reader takes: NaN and infinity are refused. An older file is replaced at once or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(data, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    aside = path.with_name(f".{path.name}.partial")
    try:
        aside.write_text(text, encoding="utf-8")
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def described_files(folder: Path, recorded: list[str]) -> dict[str, str]:
    """SHA-256 of the JSON files in ``folder`` that no other entry of the manifest covers, by their path in it."""
    files = [path for path in sorted(folder.rglob("*.json")) if path.relative_to(folder).as_posix() not in recorded]
    return {path.relative_to(folder).as_posix(): file_sha256(path) for path in files}


def write_tokenizer(folder: Path, name: str, source: TokenizerSource) -> TokenizerFile:
    """Write ``<name>/tokenizer.json``, read it back, and compare its ids with the original tokenizer's."""
    from tokenizers import Tokenizer

    path = folder / name / "tokenizer.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source.json, encoding="utf-8")
    tokenizer = Tokenizer.from_file(str(path))
    for prompt, ids in source.golden.items():
        found = tuple(tokenizer.encode(prompt).ids)
        if found != tuple(ids):
            raise ExportError(
                f"the written {name} gives other ids than the original for {prompt!r}: {list(found)}, "
                f"expected {list(ids)}."
            )
    write_json(path.with_name("tokenizer_config.json"), _tokenizer_config(source))
    relative = path.relative_to(folder).as_posix()
    return TokenizerFile(relative, file_sha256(path), source.length, dict(source.golden))


def _tokenizer_config(source: TokenizerSource) -> dict[str, Any]:
    """What transformers reads beside a ``tokenizer.json``."""
    data = json.loads(source.json)
    name = TOKENIZER_CLASSES.get(data["model"]["type"], "PreTrainedTokenizerFast")
    padding = data.get("padding") or {}
    return {"tokenizer_class": name, "model_max_length": source.length, "pad_token": padding.get("pad_token")}


def write_model_index(folder: Path, model: SourceModel) -> None:
    """Write ``model_index.json``, with classes that read the tokenizers as they are written here."""
    index = dict(model.model_index)
    for name in (name for name in index if name.startswith("tokenizer")):
        source = model.tokenizers.get(name)
        index[name] = [None, None] if source is None else ["transformers", _tokenizer_config(source)["tokenizer_class"]]
    write_json(folder / "model_index.json", index)


def write_vectors(folder: Path, component: Component, cases: list[Case]) -> dict[str, Any]:
    """Write the smallest cases with the original's outputs to ``reports/parity/<component>.npz``.

    Arrays are named ``<case>/input/<name>`` and ``<case>/output/<name>``. Gives the manifest's record of the file.
    """
    chosen: list[Case] = []
    for case in sorted(cases, key=Case.size):
        if not chosen or sum(other.size() for other in chosen) + case.size() <= VECTOR_BYTES:
            chosen.append(case)
    arrays: dict[str, Any] = {}
    for index, case in enumerate(chosen):
        arrays |= {f"{index}/input/{name}": array for name, array in case.inputs.items()}
        arrays |= {f"{index}/output/{name}": array for name, array in case.outputs.items()}
    path = folder / "reports" / "parity" / f"{component.name}.npz"
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, **arrays)
    return {
        "vectors": path.relative_to(folder).as_posix(),
        "vectors_sha256": file_sha256(path),
        "vector_cases": len(chosen),
    }

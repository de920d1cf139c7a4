"""ONNX files: written whole, or with their weights beside them where a single file would be too large."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from latentedge.runtime.bundle import EXTERNAL_DATA_LIMIT, Variant, file_sha256


def save_model(model: ir.Model, path: Path, *, keep_external: bool = False) -> None:
    """Write ``model`` to ``path``; large weights go to ``<path>.data``.

    ``keep_external`` leaves weights that already lie in a file beside ``path`` where they are.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = [value.const_value for value in model.graph.initializers.values() if value.const_value is not None]
    if keep_external and any(isinstance(tensor, ir.ExternalTensor) for tensor in tensors):
        ir.save(model, path)
    elif sum(tensor.nbytes for tensor in tensors) > EXTERNAL_DATA_LIMIT:
        ir.save(model, path, external_data=f"{path.name}.data")
    else:
        # What a half-precision graph leaves in float32 would stay in the file of the float32 graph's weights.
        ir.external_data.load_to_model(model)
        ir.save(model, path)


def external_files(path: Path) -> list[Path]:
    """Files beside ``path`` that hold weights of the graph."""
    model = ir.load(path)
    tensors = (value.const_value for value in model.graph.initializers.values())
    names = {str(tensor.location) for tensor in tensors if isinstance(tensor, ir.ExternalTensor)}
    return [path.parent / name for name in sorted(names)]


def remove_model(path: Path) -> None:
    """Delete a graph and its weights, where they exist."""
    path.unlink(missing_ok=True)
    path.with_name(f"{path.name}.data").unlink(missing_ok=True)


def variant_of(bundle: Path, path: Path) -> Variant:
    """The manifest's record of a graph inside ``bundle``: digests, and size with its weights."""
    weights = external_files(path)
    return Variant(
        path=path.relative_to(bundle).as_posix(),
        sha256=file_sha256(path),
        size=path.stat().st_size + sum(file.stat().st_size for file in weights),
        external_data={file.relative_to(bundle).as_posix(): file_sha256(file) for file in weights},
    )

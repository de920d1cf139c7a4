"""A torch module as an ONNX graph, by ``torch.export`` and torch's ONNX translation.

Every axis of the declaration is traced as an unknown length. Which relations between lengths the network needs
(a latent that is a multiple of 8) is not written into the graph: the manifest's axes say it, and the comparison with
the original covers other lengths than the traced ones.
"""

from __future__ import annotations

import contextlib
import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import onnx_ir as ir
import torch

from latentedge.export.errors import ExportError
from latentedge.export.targets import Target
from latentedge.runtime.bundle import Array, Component, TensorSpec

#: Metadata of torch's translation: the list of modules from the root to the node.
_SCOPES = "pkg.torch.onnx.name_scopes"


def onnx_from_torch(
    module: torch.nn.Module, component: Component, inputs: Mapping[str, Array], target: Target
) -> ir.Model:
    """Trace ``module`` with ``inputs`` and translate it to ONNX in the target's opset.

    The graph's inputs and outputs are named and shaped as ``component`` declares; initialisers share the module's
    memory. :class:`ExportError` names the axis that the network fixes to one length, or the part that has no
    translation.
    """
    arguments = tuple(torch.from_numpy(inputs[spec.name]) for spec in component.inputs)
    dynamic = tuple(_dynamic_sides(spec) for spec in component.inputs)
    with _quiet(), torch.no_grad():
        try:
            program = torch.export.export(module, arguments, dynamic_shapes=dynamic, strict=False)
        except Exception as error:
            raise ExportError(
                f"{component.name} could not be traced: {_first_lines(error)}",
                hint="the traced axes are " + ", ".join(component.axes),
            ) from error
        try:
            onnx_program = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=target.opset,
                input_names=[spec.name for spec in component.inputs],
                output_names=[spec.name for spec in component.outputs],
                verbose=False,
            )
        except torch.onnx.errors.OnnxExporterError as error:
            raise ExportError(f"{component.name} has no ONNX form: {_first_lines(error)}") from error
    if onnx_program is None:
        raise ExportError(f"{component.name}: torch's ONNX exporter returned nothing.")
    model = onnx_program.model
    _declare(model, component)
    return model


def module_path(node: ir.Node) -> str:
    """Path of the torch module that a node came from, such as ``input_blocks.1.0.in_layers.0``; "" for the root."""
    scopes = re.findall(r"'([^']*)'", node.metadata_props.get(_SCOPES, ""))
    path = str(scopes[-2]) if len(scopes) > 1 else ""
    return "" if path.startswith("_empty_nn_module_stack") else path


def _dynamic_sides(spec: TensorSpec) -> dict[int, Any]:
    return {index: torch.export.Dim.DYNAMIC for index, side in enumerate(spec.shape) if not isinstance(side, int)}


def _declare(model: ir.Model, component: Component) -> None:
    """Put the declared names and shapes on the graph, and the axes' names in place of torch's symbols."""
    symbols: dict[str, str] = {}
    for value, spec in zip(model.graph.inputs, component.inputs, strict=True):
        for side, declared in zip(value.shape or (), spec.shape, strict=True):
            _match(component, spec, side, declared, symbols)
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        for value in node.outputs:
            if value.shape is not None:
                value.shape = ir.Shape([_rename(side, symbols) for side in value.shape])
    for values, specs in ((model.graph.inputs, component.inputs), (model.graph.outputs, component.outputs)):
        for value, spec in zip(values, specs, strict=True):
            _check_output(component, value, spec)
            value.shape = ir.Shape(spec.shape)
            value.metadata_props.clear()


def _match(component: Component, spec: TensorSpec, side: Any, declared: int | str, symbols: dict[str, str]) -> None:
    if isinstance(side, int) != isinstance(declared, int):
        raise ExportError(
            f"{component.name} works only with {spec.name} of length {side} along {declared!r}, "
            f"which is declared to vary: {list(spec.shape)}.",
            hint="a data-dependent or hard-coded shape in the network fixes it",
        )
    if not isinstance(declared, int) and side.value is not None and side.value.isidentifier() and "*" not in declared:
        symbols[side.value] = declared


def _rename(side: Any, symbols: Mapping[str, str]) -> int | str | None:
    if isinstance(side, int) or side.value is None:
        return side if isinstance(side, int) else None
    return re.sub(r"[A-Za-z_]\w*", lambda match: symbols.get(match[0], match[0]), side.value)


def _check_output(component: Component, value: ir.Value, spec: TensorSpec) -> None:
    declared = ir.DataType.from_numpy(_numpy_dtype(spec))
    if value.dtype is not None and value.dtype != declared:
        raise ExportError(f"{component.name} {spec.name}: declared {spec.dtype}, the network has {value.dtype.name}.")
    rank = None if value.shape is None else len(value.shape)
    if rank is not None and rank != len(spec.shape):
        raise ExportError(
            f"{component.name} {spec.name}: declared {list(spec.shape)}, the network has {rank} sides: {value.shape}."
        )


def _numpy_dtype(spec: TensorSpec) -> Any:
    import numpy as np

    return np.dtype(spec.dtype)


def _first_lines(error: BaseException, lines: int = 4) -> str:
    root = error.__cause__ or error
    return " ".join(line.strip() for line in str(root).splitlines()[:lines] if line.strip())


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide what torch reports about itself during export: missing torchvision, its own deprecations."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)

"""Clean-up after translation: constants folded, dead and double things gone, names that say where a node came from."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Collection, Mapping

import onnx
import onnx_ir as ir
import onnx_ir.passes.common as common
import onnxscript.optimizer
from onnx_ir.passes import Sequential

from latentedge.export.errors import ExportError
from latentedge.export.targets import Target

#: Constants are folded up to this many elements; weights are never touched.
FOLDING_LIMIT = 1 << 20


def clean_up(model: ir.Model) -> None:
    """Fold constants, remove identities, casts without effect, dead nodes and double initialisers, in place."""
    _remove_idle_casts(model)
    onnxscript.optimizer.optimize_ir(model, input_size_limit=FOLDING_LIMIT, output_size_limit=FOLDING_LIMIT)
    Sequential(
        common.IdentityEliminationPass(),
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedFunctionsPass(),  # type: ignore[no-untyped-call]
        common.RemoveUnusedOpsetsPass(),
        common.TopologicalSortPass(),
    )(model)


def _remove_idle_casts(model: ir.Model) -> None:
    for node in list(model.graph):
        source = node.inputs[0] if node.op_type == "Cast" and node.domain == "" else None
        if source is None or source.dtype is None or node.outputs[0].is_graph_output():
            continue
        if node.attributes["to"].as_int() == source.dtype:
            node.outputs[0].replace_all_uses_with(source)
            model.graph.remove(node, safe=True)


def name_by_module(model: ir.Model, module_path: Mapping[ir.Node, str], parameters: Collection[str]) -> None:
    """Name nodes ``module/Operator``, their outputs after them, and constants after their module.

    ``parameters`` are the names of the initialisers that have a name of their own already.
    """
    taken: dict[str, int] = {}
    outputs = set(model.graph.outputs)
    for node in model.graph:
        node.name = _unique(f"{module_path.get(node, '')}/{node.op_type}", taken)
        for index, value in enumerate(node.outputs):
            if value not in outputs:
                value.name = f"{node.name}_output_{index}"
    named = set(parameters).intersection(model.graph.initializers)
    for node in model.graph:
        _name_constants(node, module_path.get(node, ""), named)


def _name_constants(node: ir.Node, path: str, named: set[str]) -> None:
    for index, value in enumerate(node.inputs):
        if value is None or not value.is_initializer() or value.name in named:
            continue
        role = "weight" if node.op_type in ("MatMul", "Gemm") else f"{node.op_type}_{index}"
        base = f"{path}.{role}".lstrip(".")
        candidates = itertools.chain([base], (f"{base}_{count}" for count in itertools.count(1)))
        value.name = next(name for name in candidates if name not in named)
        named.add(value.name)


def _unique(name: str, taken: dict[str, int]) -> str:
    taken[name] = taken.get(name, -1) + 1
    return name if taken[name] == 0 else f"{name}_{taken[name]}"


def strip_metadata(model: ir.Model) -> None:
    """Remove what translation left behind (stack traces, host paths) from every node and value."""
    common.ClearMetadataAndDocStringPass()(model)
    model.graph.metadata_props.clear()
    for value in [*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()]:
        value.metadata_props.clear()
    for node in model.graph:
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()


def check(name: str, model: ir.Model, target: Target) -> None:
    """Refuse a graph that is not valid ONNX, or that holds operators which the target does not take."""
    unknown = sorted({node.domain for node in model.graph if node.domain not in ("", "ai.onnx")})
    refused = sorted({node.op_type for node in model.graph if node.op_type in target.refused})
    opset = model.opset_imports.get("", 0)
    if unknown or model.functions:
        raise ExportError(f"{name} holds operators outside of ONNX's standard: {', '.join(unknown) or 'functions'}.")
    if refused:
        raise ExportError(f"{name} holds operators that the target {target.name} does not take: {', '.join(refused)}.")
    if opset > target.opset:
        raise ExportError(f"{name} is of opset {opset}; the target {target.name} takes at most {target.opset}.")
    try:
        common.CheckerPass()(model)
    except Exception as error:
        cause = error.__cause__ or error
        if isinstance(cause, onnx.checker.ValidationError):
            raise ExportError(f"{name} is not valid ONNX: {cause}") from error
        raise


def infer_shapes(model: ir.Model) -> None:
    """Add what ONNX's shape inference finds to the values' types and shapes."""
    logger = logging.getLogger("onnx_ir")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        common.ShapeInferencePass(strict_mode=False)(model)
    finally:
        logger.setLevel(level)

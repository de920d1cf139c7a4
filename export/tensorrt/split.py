"""A component as a chain of engines, none larger than a limit, for boards whose builder fails on large ones."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import onnx_ir as ir

from latentedge.export.graph_cut import CutGraph, cut, cut_positions
from latentedge.export.onnx_files import save_model
from latentedge.export.tensorrt.engine_from_onnx import (
    BuilderSettings,
    CompiledPlan,
    Profile,
    engine_from_onnx,
    output_shapes,
)
from latentedge.runtime.errors import EngineError

#: The part of an engine's memory that its weights may take; the rest is for scratch memory.
WEIGHT_SHARE = 0.75


def compile_parts(
    library: Any, path: Path, profile: Profile, settings: BuilderSettings, limit: int
) -> list[CompiledPlan]:
    """Cut the graph at ``path`` at block boundaries and compile the parts, each of at most ``limit`` bytes.

    :class:`EngineError` when a compiled part takes more than that in weights and scratch memory.
    """
    graph = CutGraph.of(ir.load(path))
    parts = cut(graph, cut_positions(graph, int(WEIGHT_SHARE * limit)))
    plans = []
    with tempfile.TemporaryDirectory(prefix="latentedge-") as folder:
        shapes = {name: list(ends) for name, ends in profile.items()}
        for index, part in enumerate(parts):
            file = Path(folder) / f"{path.stem}.part{index}.onnx"
            save_model(part, file)
            names = [value.name for value in part.graph.inputs if value.name is not None]
            plan = engine_from_onnx(library, file, {name: _ends(shapes[name]) for name in names}, settings)
            _check_memory(file.stem, plan, limit)
            plans.append(plan)
            for end in range(3):
                found = output_shapes(library, file, {name: shapes[name][end] for name in names})
                for name, shape in found.items():
                    shapes.setdefault(name, []).insert(end, shape)
            file.unlink()
    return plans


def _ends(shapes: list[tuple[int, ...]]) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    shortest, best, longest = shapes
    return shortest, best, longest


def _check_memory(name: str, plan: CompiledPlan, limit: int) -> None:
    taken = sum(plan.memory.values())
    if taken > limit:
        sizes = ", ".join(f"{kind.replace('_', ' ')} {size}" for kind, size in plan.memory.items())
        raise EngineError(
            f"{name} takes {taken} bytes ({sizes}), more than the asked-for {limit}.",
            hint="build for smaller pictures or batches, or raise --max-engine-memory",
        )

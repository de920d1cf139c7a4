"""ONNX Runtime's own copy of each graph: optimised once, kept in ``engines/``, loaded without being optimised again.

Three ways of writing a copy compete, each compared with the bundle's graph on the same inputs: ``plain`` is what the
library itself makes of the graph, ``fused`` has attention and skip connections before a normalisation as one operator
each, ``sliced`` computes attention in pieces of its queries. ``fused`` is kept where it measures faster than ``plain``.
For ``generate --low-memory`` the one whose run has the lowest peak of memory is kept beside it, where that saves
anything.
"""

from __future__ import annotations

import contextlib
import functools
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime

from latentedge.export import attention
from latentedge.export.builders import BuildRequest, components_to_build
from latentedge.export.errors import ExportError
from latentedge.export.latency import example_inputs, in_turns
from latentedge.export.tensorrt.store import store_files
from latentedge.runtime.bundle import Array, Bundle, Component, Variant
from latentedge.runtime.engines.base import EngineOptions
from latentedge.runtime.engines.onnxruntime import graph_key, open_session
from latentedge.runtime.engines.plans import engines_folder
from latentedge.runtime.errors import EngineError, ParityError
from latentedge.runtime.parity import FLOORS, compare

#: Lowest PSNR of a copy against the bundle's graph in fp32; a quantised value may be rounded to its neighbour.
FLOOR_DB = {**FLOORS, "fp32": 100.0, "int8": 30.0}

GRAPH, WEIGHTS = "graph.onnx", "graph.onnx.data"

#: Share of the peak that another copy must save to be kept for its memory.
LEAST_SAVED = 0.03


def optimise_bundle(bundle: Bundle, request: BuildRequest) -> None:
    """Write the copies of every component and precision into the bundle's ``engines``, and say what was kept.

    :class:`~latentedge.runtime.errors.ParityError` where a copy does not give what the bundle's graph gives.
    """
    folder = engines_folder(bundle, request.cache)
    for component in components_to_build(bundle, "onnxruntime"):
        for precision in component.variants:
            with tempfile.TemporaryDirectory(dir=_made(folder)) as scratch:
                for line in optimise(bundle, component, precision, folder, Path(scratch)):
                    request.notify(f"{component.name} {precision}: {line}")


def optimise(bundle: Bundle, component: Component, precision: str, folder: Path, scratch: Path) -> Iterator[str]:
    """Write, compare and measure the copies of one graph; gives a line on each that was weighed."""
    source, variant = bundle.variant(component.name, precision)
    axes = {name: axis.opt for name, axis in component.axes.items()}
    inputs = example_inputs(component, axes)
    with _session(source) as plain:
        reference = _run(plain, inputs)
    copies = {"plain": write_copy(source, scratch / "plain")}
    for style, rewrite in REWRITES.items():
        path = _rewritten(source, scratch / style, rewrite)
        if path is not None:
            copies[style] = path
    for style, path in copies.items():
        _check(component, precision, style, reference, path, inputs)
    kept, measured = "plain", {}
    if "fused" in copies:
        ratios = _ratios(copies["plain"], copies["fused"], inputs)
        measured = {"ratio": float(np.median(ratios)), "ratio_low": float(np.quantile(ratios, 0.25))}
        kept = "fused" if measured["ratio_low"] > 1 else "plain"
        faster = f"{measured['ratio']:.3f} times as fast (lower quartile {measured['ratio_low']:.3f})"
        yield f"fused is {faster}{', kept' if kept == 'fused' else ', left out'}"
    low = ""
    if len(copies) > 1:
        single = example_inputs(component, {**axes, **({"batch": 1} if "batch" in axes else {})})
        peaks = {style: _peak(path, single, scratch) for style, path in copies.items()}
        low = min(peaks, key=lambda style: peaks[style])
        low = low if peaks[low] < peaks[kept] * (1 - LEAST_SAVED) else ""
        table = ", ".join(f"{style} {size / 2**20:.0f} MiB" for style, size in peaks.items())
        yield f"peak of one picture: {table}; {f'{low} is kept for --low-memory' if low else 'none is kept for its memory'}"
    if low:
        _store(folder, component, precision, variant, low, copies[low].parent, {"peaks": peaks}, low_memory=True)
    _store(folder, component, precision, variant, kept, copies[kept].parent, measured, low_memory=False)


def fuse(model: ir.Model) -> int:
    """Attention, and additions whose sum is normalised, as one operator each; gives how many there are."""
    return attention.fuse(model) + fuse_skips(model)


def fuse_skips(model: ir.Model) -> int:
    """``Add`` and then ``LayerNormalization`` of ``[batch, tokens, width]`` as SkipLayerNormalization.

    The sum, which the next block adds to, is the operator's fourth output.
    """
    count = 0
    for node in list(model.graph):
        added = node.inputs[0].producer() if node.op_type == "LayerNormalization" and node.inputs[0] else None
        if added is None or added.op_type != "Add" or not _normalises_last(node):
            continue
        pair = [value for value in added.inputs if value is not None and _is_skip(value, added.outputs[0])]
        parameters = [value for value in node.inputs[1:] if value is not None]
        if len(pair) != 2 or not parameters:
            continue
        attributes = {"epsilon": node.attributes.get_float("epsilon", 1e-5)}
        fused = ir.node(
            "SkipLayerNormalization", [*pair, *parameters], attributes, domain="com.microsoft", num_outputs=4
        )
        pairs = ((node.outputs[0], fused.outputs[0]), (added.outputs[0], fused.outputs[3]))
        for old, new in pairs:
            new.name = f"{old.name}/fused"
        model.graph.insert_before(added, fused)
        for old, new in pairs:
            attention.replace_value(old, new)
        model.graph.remove([node, added], safe=True)
        count += 1
    if count:
        model.opset_imports["com.microsoft"] = 1
    return count


def _normalises_last(node: ir.Node) -> bool:
    return node.attributes.get_int("axis", -1) == -1 and len(node.outputs) == 1


def _is_skip(value: ir.Value, total: ir.Value) -> bool:
    """Whether ``value`` has three sides and the last one of the sum, so that nothing is repeated along the width."""
    shapes = value.shape, total.shape
    return all(shape is not None and len(shape) == 3 for shape in shapes) and shapes[0] == shapes[1]


#: How a copy may differ from what the library makes of the graph by itself.
REWRITES: dict[str, Callable[[ir.Model], int]] = {"fused": fuse, "sliced": attention.slice_queries}


def write_copy(source: Path | ir.Model, folder: Path) -> Path:
    """Let the library optimise a graph for this processor and write it, its weights beside it, into ``folder``.

    :class:`ExportError` where it refuses.
    """
    folder.mkdir(parents=True)
    graph = source
    if isinstance(source, ir.Model):
        graph = folder / "rewritten.onnx"
        ir.save(source, graph, external_data="rewritten.onnx.data")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(folder / GRAPH)
    options.add_session_config_entry("session.optimized_model_external_initializers_file_name", WEIGHTS)
    options.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "1024")
    try:
        onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ExportError(f"ONNX Runtime cannot optimise {graph}: {error}") from error
    for name in ("rewritten.onnx", "rewritten.onnx.data"):
        (folder / name).unlink(missing_ok=True)
    return folder / GRAPH


def _rewritten(source: Path, folder: Path, rewrite: Callable[[ir.Model], int]) -> Path | None:
    model = ir.load(source)
    return write_copy(model, folder) if rewrite(model) else None


@contextlib.contextmanager
def _session(path: Path) -> Iterator[Any]:
    session = open_session(path, EngineOptions(), optimise=path.name != GRAPH)
    yield session
    del session


def _run(session: Any, inputs: Mapping[str, Array]) -> dict[str, Array]:
    names = [output.name for output in session.get_outputs()]
    taken = {entry.name for entry in session.get_inputs()}
    arrays = session.run(None, {name: array for name, array in inputs.items() if name in taken})
    return dict(zip(names, arrays, strict=True))


def _check(
    component: Component, precision: str, style: str, reference: Mapping[str, Array], path: Path,
    inputs: Mapping[str, Array],
) -> None:  # fmt: skip
    with _session(path) as session:
        found = _run(session, inputs)
    for spec in component.outputs:
        parity = compare(reference[spec.name], found[spec.name])
        if parity.psnr_db < FLOOR_DB[precision]:
            raise ParityError(
                f"{component.name} in {precision}, {style} for ONNX Runtime, does not give what the bundle's graph gives: "
                f"{spec.name} {parity.describe()}, the floor is {FLOOR_DB[precision]:g} dB."
            )


def _ratios(plain: Path, fused: Path, inputs: Mapping[str, Array]) -> Array:
    with _session(plain) as first, _session(fused) as second:
        sessions = {"plain": first, "fused": second}
        for session in sessions.values():
            _run(session, inputs)
        seconds = in_turns({name: functools.partial(_run, session, inputs) for name, session in sessions.items()})
    ratios: Array = np.array(seconds["plain"]) / np.array(seconds["fused"])
    return ratios


#: Run in a process of its own, whose peak is the graph's.
_PEAK = """
import sys
from pathlib import Path
import numpy as np
from latentedge.runtime.engines.base import EngineOptions
from latentedge.runtime.engines.onnxruntime import open_session
session = open_session(Path(sys.argv[1]), EngineOptions(low_memory=True), optimise=False)
taken = {entry.name for entry in session.get_inputs()}
with np.load(sys.argv[2]) as inputs:
    session.run(None, {name: inputs[name] for name in inputs.files if name in taken})
lines = Path("/proc/self/status").read_text().splitlines()
print(next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")))
"""


def _peak(path: Path, inputs: Mapping[str, Array], scratch: Path) -> int:
    """Bytes that a process holds at most while it loads a copy and runs it once."""
    arrays = scratch / "inputs.npz"
    if not arrays.is_file():
        named: dict[str, Any] = dict(inputs)
        np.savez(arrays, **named)
    command = [sys.executable, "-c", _PEAK, str(path), str(arrays)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise EngineError(f"the peak of {path} could not be measured: {done.stderr.strip().splitlines()[-1:]}")
    return int(done.stdout)


def _store(
    folder: Path, component: Component, precision: str, variant: Variant, style: str, written: Path,
    measured: Mapping[str, Any], *, low_memory: bool,
) -> None:  # fmt: skip
    key = graph_key(component, precision, variant, low_memory=low_memory)
    store_files(folder, key, lambda aside: _moved(written, aside), measured={"style": style, **measured})


def _moved(written: Path, aside: Path) -> list[Path]:
    """The files of a copy in their place, under the names by which the graph knows its weights."""
    return [Path(shutil.copy2(path, aside)) for path in sorted(written.iterdir())]


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder

"""A plan from an ONNX graph, with TensorRT 10.3 and later, 11.x and TensorRT-RTX.

Every network is strongly typed: the precision is the graph's. TF32 is off, so that fp32 is fp32.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentedge.export.tensorrt.progress import progress_bars, progress_monitor, stop_on_interrupt
from latentedge.runtime.bundle import Axis, TensorSpec
from latentedge.runtime.engines.tensorrt import Log
from latentedge.runtime.errors import EngineError, UsageError

if TYPE_CHECKING:
    import tensorrt as trt

Shape = tuple[int, ...]
#: Shortest, best and longest shape of each input.
Profile = Mapping[str, tuple[Shape, Shape, Shape]]

_MEMORY_LINES = {
    "weight_memory": re.compile(r"Total Weights Memory: (\d+) bytes"),
    "scratch_memory": re.compile(r"Total Activation Memory: (\d+) bytes"),
}
#: Warnings that say nothing about the graph.
_NOISE = re.compile(
    r"Local timing cache|minShape is not the same|compiler backend|has Int64 binding|is unused or used only at compile-time",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class BuilderSettings:
    """What the builder is told besides graph and profile; ``None`` is the library's own default."""

    compute_capabilities: tuple[str, ...] = ()
    optimization_level: int | None = None
    #: Bytes, for scratch memory and for what timing a kernel may take.
    memory_limit: int | None = None
    version_compatible: bool = False
    #: Leave the weights out; they are filled in from the ONNX file when the plan is loaded.
    stripped: bool = False
    timing_cache: Path | None = None


@dataclass
class CompiledPlan:
    """A serialised plan and what the compiler told about it. Sizes in bytes."""

    content: Any
    seconds: float
    plan_size: int
    memory: dict[str, int] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


class CompileLog(Log):
    """A log that also keeps warnings and the memory that the builder reports."""

    def __init__(self, library: Any) -> None:
        self.memory: dict[str, int] = {}
        self.warnings: list[str] = []
        super().__init__(library, self._listen)

    def _listen(self, severity: str, message: str) -> None:
        for name, pattern in _MEMORY_LINES.items():
            if match := pattern.search(message):
                self.memory[name] = max(self.memory.get(name, 0), int(match[1]))
        if severity == "WARNING" and not _NOISE.search(message) and message not in self.warnings:
            self.warnings.append(message.strip())


class CompileError(EngineError):
    """A graph that the library does not take; ``complaints`` say which nodes and why."""

    def __init__(self, message: str, complaints: Sequence[str]) -> None:
        super().__init__(message + "".join(f"\n  {line}" for line in complaints))
        self.complaints = tuple(complaints)


def engine_from_onnx(library: Any, path: Path, profile: Profile, settings: BuilderSettings) -> CompiledPlan:
    """Compile the graph at ``path``; :class:`CompileError` says what the parser or the builder refused."""
    log = CompileLog(library)
    start = time.perf_counter()
    builder: trt.Builder = library.Builder(log.logger)
    network = parsed_network(library, builder, path, log)
    config = builder.create_builder_config()
    _configure(library, config, settings)
    config.add_optimization_profile(_profile(library, builder, profile))
    with stop_on_interrupt() as stop, progress_bars() as bars:
        config.progress_monitor = progress_monitor(library, stop, bars)
        content = builder.build_serialized_network(network, config)
    if content is None:
        raise CompileError(f"{path.name} does not compile:", log.errors or ["the builder gave no reason"])
    _keep_timings(config, settings.timing_cache)
    return CompiledPlan(content, time.perf_counter() - start, content.nbytes, log.memory, tuple(log.warnings))


def parsed_network(library: Any, builder: trt.Builder, path: Path, log: Log) -> trt.INetworkDefinition:
    """The strongly typed network of an ONNX file; :class:`CompileError` names the nodes that the parser refuses."""
    flag = 1 << int(library.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(flag)
    parser: trt.OnnxParser = library.OnnxParser(network, log.logger)
    if not parser.parse_from_file(str(path)):
        errors = [parser.get_error(index) for index in range(parser.num_errors)]
        complaints = [complaint(error.node_name(), error.node_operator(), error.desc()) for error in errors]
        raise CompileError(f"{path.name} is not taken by the ONNX parser:", complaints or log.errors)
    return network


def complaint(node: str, operator: str, words: str) -> str:
    """A parser's error in the user's words: which node of the graph, from which torch module.

    The exporter names nodes ``module/Operator``.
    """
    module = node.rpartition("/")[0]
    origin = f" of torch module {module}" if module else ""
    return f"{operator or 'node'} {node}{origin}: {words}" if node else words


def _configure(library: Any, config: trt.IBuilderConfig, settings: BuilderSettings) -> None:
    flags = library.BuilderFlag
    config.clear_flag(flags.TF32)
    if settings.version_compatible:
        config.set_flag(flags.VERSION_COMPATIBLE)
    if settings.stripped:
        config.set_flag(flags.STRIP_PLAN)
        config.set_flag(flags.REFIT_IDENTICAL)
    if settings.optimization_level is not None:
        config.builder_optimization_level = settings.optimization_level
    if settings.memory_limit is not None:
        for pool in (library.MemoryPoolType.WORKSPACE, library.MemoryPoolType.TACTIC_DRAM):
            config.set_memory_pool_limit(pool, settings.memory_limit)
    if settings.compute_capabilities:
        _target(library, config, settings.compute_capabilities)
    if settings.timing_cache is not None:
        content = settings.timing_cache.read_bytes() if settings.timing_cache.is_file() else b""
        config.set_timing_cache(config.create_timing_cache(content), ignore_mismatch=False)


def _target(library: Any, config: Any, capabilities: Sequence[str]) -> None:
    known = known_capabilities(library)
    unknown = [name for name in capabilities if name not in known]
    if unknown:
        raise UsageError(
            f"TensorRT-RTX {library.__version__} does not compile for compute capability {', '.join(unknown)}; "
            f"it knows: {', '.join(known)}."
        )
    config.num_compute_capabilities = len(capabilities)
    for index, name in enumerate(capabilities):
        config.set_compute_capability(known[name], index)


def known_capabilities(library: Any) -> dict[str, Any]:
    """What TensorRT-RTX compiles for ahead of time, by name such as ``"8.9"``."""
    members = library.ComputeCapability.__members__
    return {f"{name[2:-1]}.{name[-1]}": member for name, member in members.items() if name.startswith("SM")}


def _profile(library: Any, builder: trt.Builder, shapes: Profile) -> trt.IOptimizationProfile:
    profile = builder.create_optimization_profile()
    for name, ends in shapes.items():
        profile.set_shape(name, *(library.Dims(list(shape)) for shape in ends))
    return profile


def _keep_timings(config: trt.IBuilderConfig, path: Path | None) -> None:
    cache = config.get_timing_cache() if path is not None else None
    if path is not None and cache is not None:
        aside = path.with_name(f"{path.name}.partial")
        aside.write_bytes(bytes(cache.serialize()))
        aside.replace(path)


def profile_of(inputs: Sequence[TensorSpec], axes: Mapping[str, Axis]) -> dict[str, tuple[Shape, Shape, Shape]]:
    """The profile of declared inputs for ranges of their axes."""
    shortest, best, longest = (
        {name: int(getattr(axis, end)) for name, axis in axes.items()} for end in ("min", "opt", "max")
    )
    return {spec.name: (spec.resolve(shortest), spec.resolve(best), spec.resolve(longest)) for spec in inputs}


def output_shapes(library: Any, path: Path, shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    """The shapes of a graph's outputs for fixed shapes of its inputs, as TensorRT itself infers them."""
    log = CompileLog(library)
    builder: trt.Builder = library.Builder(log.logger)
    network = parsed_network(library, builder, path, log)
    for index in range(network.num_inputs):
        value = network.get_input(index)
        value.shape = library.Dims(list(shapes[value.name]))
    found = {}
    for index in range(network.num_outputs):
        value = network.get_output(index)
        sides = tuple(int(value.shape[axis]) for axis in range(len(value.shape)))
        if min(sides, default=1) < 1:
            raise CompileError(f"{path.name}: the shape of {value.name} does not follow from the inputs:", log.errors)
        found[value.name] = sides
    return found

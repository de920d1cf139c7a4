"""``latentedge build --backend tensorrt`` and ``tensorrt-rtx``: an engine for each component and precision."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from latentedge.export.builders import BuildRequest, BuildRow, components_to_build
from latentedge.export.latency import measure_bundle
from latentedge.export.tensorrt.engine_from_onnx import (
    BuilderSettings,
    CompiledPlan,
    CompileError,
    engine_from_onnx,
    profile_of,
)
from latentedge.export.tensorrt.profiles import engine_axes
from latentedge.export.tensorrt.store import build_lock, store_plan, stored_plan
from latentedge.runtime.bundle import Axis, Bundle, Component, file_sha256
from latentedge.runtime.engines import backend as find_backend
from latentedge.runtime.engines import cuda
from latentedge.runtime.engines.hoisted import SHALLOW, part_name
from latentedge.runtime.engines.plans import PlanKey, engines_folder, this_platform, variant_digests
from latentedge.runtime.engines.tensorrt import load_library
from latentedge.runtime.errors import BundleError, UsageError
from latentedge.runtime.selection import DENOISER, PRECISIONS, component_precision

#: What `--check` compiles for when no compute capability is named: GeForce RTX 30, 40 and 50.
CHECKED_CAPABILITIES = ("8.6", "8.9", "12.0")
RTX = "tensorrt-rtx"


def build(request: BuildRequest) -> list[BuildRow]:
    """Build, or only check, every component in every asked-for precision, one after the other.

    When all precisions are built for this machine they are timed too, so that ``auto`` can choose.
    """
    find_backend(request.backend)
    if request.stripped and request.max_engine_memory:
        raise UsageError("--plan stripped cannot be combined with --max-engine-memory: a part has no ONNX file.")
    library = load_library(request.backend)
    capabilities = target_capabilities(request)
    if request.step_caching:
        request = dataclasses.replace(request, bundle=_cut_for_step_caching(request))
    rows = []
    for component, precision in work_of(request):
        axes = engine_axes(request, component)
        key = plan_key(request, library, component, precision, axes, capabilities)
        if request.check:
            rows.extend(_check(request, library, component, key))
        else:
            rows.append(_build(request, library, component, key))
    if not (request.check or request.precisions or request.compute_capabilities):
        measure_bundle(request.bundle, request.backend, request.notify)
    return rows


def _cut_for_step_caching(request: BuildRequest) -> Bundle:
    """The bundle with the denoiser cut for step caching; a check writes nothing, so there it has to be cut already."""
    if not request.check:
        # Cutting reads the graph; a build alone needs neither onnx nor onnx_ir.
        from latentedge.export.parts_builder import split_denoiser

        return split_denoiser(request)
    if part_name(DENOISER, SHALLOW) not in request.bundle.manifest.components:
        raise UsageError(
            f"{request.bundle.path} has no graphs for step caching, and --check writes none.",
            hint="leave --check out, or write them with --backend onnxruntime --plan step-caching",
        )
    return request.bundle


def work_of(request: BuildRequest) -> Iterator[tuple[Component, str]]:
    """Each component with each precision that it runs in, once."""
    bundle = request.bundle
    done = set()
    for asked in request.precisions or present_precisions(bundle, request.backend):
        for component in components_to_build(bundle, request.backend, step_caching=request.step_caching):
            precision = component_precision(component, asked, request.backend)
            bundle.variant(component.name, precision)
            if (component.name, precision) not in done:
                done.add((component.name, precision))
                yield component, precision


def present_precisions(bundle: Bundle, backend: str) -> tuple[str, ...]:
    """The precisions of the bundle's denoiser (or first component) that a backend runs."""
    components = bundle.manifest.components
    component = components[DENOISER] if DENOISER in components else next(iter(components.values()))
    return tuple(name for name in component.variants if name in PRECISIONS[backend])


def target_capabilities(request: BuildRequest) -> tuple[str, ...]:
    """Compute capabilities to build for: asked for, or this machine's GPU."""
    if request.backend == RTX and (request.compute_capabilities or request.check):
        return request.compute_capabilities or CHECKED_CAPABILITIES
    here = cuda.compute_capability()
    if any(name != here for name in request.compute_capabilities):
        raise UsageError(
            f"TensorRT builds for the GPU that is here ({here}), asked for: {', '.join(request.compute_capabilities)}.",
            hint="build on the target itself, or with --backend tensorrt-rtx where it runs that GPU",
        )
    return (here,)


def plan_key(
    request: BuildRequest,
    library: Any,
    component: Component,
    precision: str,
    axes: dict[str, Axis],
    capabilities: tuple[str, ...],
) -> PlanKey:
    """The key of one engine: everything that it will depend on."""
    return PlanKey(
        backend=request.backend,
        library_version=library.__version__,
        component=component.name,
        precision=precision,
        weights=variant_digests(request.bundle.variant(component.name, precision)[1]),
        axes=axes,
        compute_capabilities=capabilities,
        platform=this_platform(),
        options={
            "optimization_level": request.optimization_level,
            "memory_limit": request.memory_limit,
            "max_engine_memory": request.max_engine_memory if component.name == DENOISER else None,
            "version_compatible": request.version_compatible,
            "stripped": request.stripped,
        },
    )


def graph_file(bundle: Bundle, component: Component, precision: str) -> Path:
    """The graph of a component, whose bytes and weights are what the manifest says; :class:`BundleError` otherwise."""
    path, variant = bundle.variant(component.name, precision)
    for name, expected in variant_digests(variant).items():
        found = file_sha256(bundle.file(name))
        if found != expected:
            raise BundleError(
                f"{bundle.path / name} is not the file that was proven: expected SHA-256 {expected}, found {found}.",
                hint="export the checkpoint again",
            )
    return path


def _build(request: BuildRequest, library: Any, component: Component, key: PlanKey) -> BuildRow:
    folder = engines_folder(request.bundle, request.cache)
    with build_lock(folder, key, request.notify):
        start = time.perf_counter()
        stored = stored_plan(folder, key)
        plans: Sequence[CompiledPlan] = ()
        if stored is None:
            plans = compile_component(library, request.bundle, component, key, timing_cache(folder, key))
            stored = store_plan(folder, key, [plan.content for plan in plans])
    size = sum(file.size for file in stored.files)
    row = _row(key, time.perf_counter() - start, plans)
    return dataclasses.replace(row, folder=stored.folder, plan_size=size, parts=len(stored.files), reused=not plans)


def _check(request: BuildRequest, library: Any, component: Component, key: PlanKey) -> list[BuildRow]:
    """One row where all targets compile; else one for each target, compiled alone."""
    start = time.perf_counter()
    try:
        plans = compile_component(library, request.bundle, component, key, None)
    except CompileError as error:
        if len(key.compute_capabilities) > 1:
            alone = [dataclasses.replace(key, compute_capabilities=(name,)) for name in key.compute_capabilities]
            return [row for single in alone for row in _check(request, library, component, single)]
        seconds = time.perf_counter() - start
        return [BuildRow(key.component, key.precision, _target(key), seconds, errors=error.complaints)]
    return [_row(key, time.perf_counter() - start, plans)]


def compile_component(
    library: Any, bundle: Bundle, component: Component, key: PlanKey, timings: Path | None
) -> list[CompiledPlan]:
    """The plans of one component, more than one where the key limits an engine's memory."""
    path = graph_file(bundle, component, key.precision)
    settings = BuilderSettings(
        compute_capabilities=key.compute_capabilities if key.backend == RTX else (),
        optimization_level=key.options["optimization_level"],
        memory_limit=key.options["memory_limit"],
        version_compatible=key.options["version_compatible"],
        stripped=key.options["stripped"],
        timing_cache=timings,
    )
    profile = profile_of(component.inputs, key.axes)
    limit = key.options["max_engine_memory"]
    if limit is None:
        return [engine_from_onnx(library, path, profile, settings)]
    from latentedge.export.tensorrt.split import compile_parts

    return compile_parts(library, path, profile, settings, limit)


def timing_cache(folder: Path, key: PlanKey) -> Path | None:
    """Where measured kernel times are kept between builds; TensorRT-RTX measures none when it compiles."""
    if key.backend == RTX:
        return None
    return folder / f"timings-{key.library_version}-{'_'.join(key.compute_capabilities)}.cache"


def _row(key: PlanKey, seconds: float, plans: Sequence[CompiledPlan]) -> BuildRow:
    """What the compiler told; of consecutive engines the sizes' sums, and the largest scratch memory, which they share."""

    def memory(name: str) -> list[int]:
        return [plan.memory[name] for plan in plans if name in plan.memory]

    return BuildRow(
        key.component,
        key.precision,
        _target(key),
        seconds,
        plan_size=sum(plan.plan_size for plan in plans) if plans else None,
        weight_memory=sum(memory("weight_memory")) if memory("weight_memory") else None,
        scratch_memory=max(memory("scratch_memory"), default=None),
        warnings=tuple(dict.fromkeys(line for plan in plans for line in plan.warnings)),
        parts=max(len(plans), 1),
    )


def _target(key: PlanKey) -> str:
    return ", ".join(key.compute_capabilities)

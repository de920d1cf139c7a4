"""A denoiser in three engines: what depends on the conditioning, what on the timestep, and the rest of each step.

``latentedge export`` splits the graph (``docs/speed.md``). The parts run only when what they read was written anew.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping

import numpy as np

from latentedge.runtime.bundle import Array, Bundle, Component, TensorSpec, graph_precision
from latentedge.runtime.engines.base import Engine, EngineOptions
from latentedge.runtime.errors import UsageError

#: The component that may be in parts.
DENOISER = "unet"

#: The parts in the order in which they run; a part that would hold nothing is not there.
PARTS = ("conditioning", "timestep", "step")

#: With step caching the step is there as two graphs (``docs/speed.md``).
FULL, SHALLOW = "full", "shallow"

#: Timesteps whose results are kept, so that the next picture of the same schedule does not compute them again.
KEPT_TIMESTEPS = 256

#: Bindings whose conditioning is kept while another one is bound.
KEPT_BINDINGS = 2

#: Bound axes, by name, sorted.
Axes = tuple[tuple[str, int], ...]


def part_name(component: str, part: str) -> str:
    """The component that holds a part, such as ``unet.step``."""
    return f"{component}.{part}"


def open_parts(
    bundle: Bundle,
    component: Component,
    precision: str,
    options: EngineOptions,
    opener: Callable[[Bundle, Component, str, EngineOptions], Engine],
) -> HoistedEngine | None:
    """``component`` in parts, where the bundle holds them in ``precision``; ``None`` where it does not.

    The hoisted parts run in fp32: they run once for a prompt or a timestep, and everything after depends on them.
    """
    if component.name != DENOISER:
        return None
    components = bundle.manifest.components
    found = {part: components[name] for part in PARTS if (name := part_name(component.name, part)) in components}
    if PARTS[-1] not in found or graph_precision(precision) not in found[PARTS[-1]].variants:
        _refuse_caching(bundle, precision, options)
        return None
    step = found.pop(PARTS[-1])
    engines = {part: opener(bundle, spec, "fp32", options) for part, spec in found.items()}
    if options.caching:
        full, shallow = (components.get(part_name(component.name, part)) for part in (FULL, SHALLOW))
        if full is None or shallow is None or graph_precision(precision) not in shallow.variants:
            _refuse_caching(bundle, precision, options)
        else:
            whole = opener(bundle, full, precision, options)
            reduced = opener(bundle, shallow, precision, options)
            engines[PARTS[-1]] = CachedStepEngine(step, precision, whole, reduced, options)
    else:
        engines[PARTS[-1]] = opener(bundle, step, precision, options)
    return HoistedEngine(component, precision, engines)


def _refuse_caching(bundle: Bundle, precision: str, options: EngineOptions) -> None:
    if options.caching:
        raise UsageError(
            f"step caching was asked for, and {bundle.path} has no full and shallow denoiser in {precision}.",
            hint="write them with `latentedge build BUNDLE --backend openvino --plan step-caching`",
        )


class CachedStepEngine(Engine):
    """The step of a denoiser whose deep blocks are computed in some evaluations only, as ``options`` say.

    ``full`` gives beside the step's output the tensor that its deep blocks pass up; ``shallow`` takes it as an input.
    """

    def __init__(
        self, component: Component, precision: str, full: Engine, shallow: Engine, options: EngineOptions
    ) -> None:
        super().__init__(component, precision)
        self.backend = full.backend
        self._interval, self._scheduled = options.cache_interval, frozenset(options.cache_full)
        self._full, self._shallow, self._last = full, shallow, full
        self._kept = {spec.name for spec in shallow.component.inputs}
        own = {spec.name for spec in component.outputs}
        self._deep = next(spec.name for spec in full.component.outputs if spec.name not in own)
        #: Evaluations of this picture so far.
        self._index = 0

    def restart(self) -> None:
        """A new picture begins: the next evaluation is a full one."""
        self._index = 0

    def _bind(self) -> None:
        self._full.bind(**self.axes)
        self._shallow.bind(**self.axes)
        self.restart()

    def _write(self, spec: TensorSpec, array: Array) -> None:
        self._full.write(spec.name, array)
        if spec.name in self._kept:
            self._shallow.write(spec.name, array)

    def _run(self) -> None:
        if self._is_full(self._index):
            self._full.run()
            self._shallow.write(self._deep, self._full.read(self._deep))
            self._last = self._full
        else:
            self._shallow.run()
            self._last = self._shallow
        self._index += 1

    def _is_full(self, index: int) -> bool:
        """Whether an evaluation, counted from a picture's first, computes the deep blocks; the first one always does."""
        if self._scheduled:
            return index == 0 or index in self._scheduled
        return index % self._interval == 0

    def _read(self, spec: TensorSpec) -> Array:
        return self._last.read(spec.name)

    def _close(self) -> None:
        self._full.close()
        self._shallow.close()


class HoistedEngine(Engine):
    """Presents the inputs and outputs of the whole ``component``; ``parts`` are engines by part."""

    def __init__(self, component: Component, precision: str, parts: Mapping[str, Engine]) -> None:
        super().__init__(component, precision)
        self.backend = parts["step"].backend
        self._step = parts["step"]
        self._conditioning = parts.get("conditioning")
        self._timestep = parts.get("timestep")
        self._parts = [parts[name] for name in PARTS if name in parts]
        #: Parts by the name of an input whose data they read.
        self._readers: dict[str, list[Engine]] = {}
        for engine in self._parts:
            for spec in engine.component.inputs:
                if not self._shape_only(engine, spec.name):
                    self._readers.setdefault(spec.name, []).append(engine)
        self._changed: set[str] = set()
        self._bound_axes: Axes = ()
        #: What was written that is neither sample nor timestep, and for other bindings that with what came of it.
        self._given: dict[str, Array] = {}
        self._conditioned = False
        self._kept: OrderedDict[Axes, tuple[dict[str, Array], dict[str, Array]]] = OrderedDict()
        #: The written timestep, and the one whose results the step holds.
        self._next_timestep = b""
        self._current: bytes | None = None
        self._lowest = float("inf")
        #: Results by bound axes and timestep.
        self._timesteps: OrderedDict[tuple[Axes, bytes], dict[str, Array]] = OrderedDict()

    def _bind(self) -> None:
        self._keep_conditioning()
        for engine in self._parts:
            engine.bind(**{name: self.axes[name] for name in engine.component.axes})
            for spec in engine.component.inputs:
                if self._shape_only(engine, spec.name):
                    engine.write(spec.name, np.zeros(spec.resolve(self.axes), np.dtype(spec.dtype)))
        self._changed.clear()
        # What is kept of this binding from before stays: guidance in a part of the steps goes from one to another and back.
        self._current = None
        self._bound_axes = tuple(sorted(self.axes.items()))
        self._restart()

    def _keep_conditioning(self) -> None:
        """Guidance in a part of the steps comes back to a binding with the same prompt: what came of it stays."""
        if self._conditioning is not None and self._conditioned and not self._changed:
            self._kept[self._bound_axes] = self._given, self._outputs_of(self._conditioning)
            self._kept.move_to_end(self._bound_axes)
            if len(self._kept) > KEPT_BINDINGS:
                self._kept.popitem(last=False)
        self._given, self._conditioned = {}, False

    def _shape_only(self, engine: Engine, name: str) -> bool:
        """Whether a hoisted part takes an input for its shape alone: what read its data would not be in that part."""
        return (name == "sample" and engine is not self._step) or (name == "timestep" and engine is self._conditioning)

    def _write(self, spec: TensorSpec, array: Array) -> None:
        self._changed.add(spec.name)
        for engine in self._readers.get(spec.name, ()):
            engine.write(spec.name, array)
        if spec.name == "timestep":
            if float(array[0]) >= self._lowest:
                self._restart()
            self._next_timestep, self._lowest = array.tobytes(), float(array[0])
        elif spec.name != "sample":
            self._given[spec.name] = array.copy()

    def _run(self) -> None:
        if self._changed - {"sample", "timestep"}:
            self._condition()
        if self._timestep is not None and self._next_timestep != self._current:
            self._pass_on(self._timestep_outputs(self._timestep))
            self._current = self._next_timestep
        self._changed.clear()
        self._step.run()

    def _condition(self) -> None:
        """Hand the step what follows from the conditioning as it was written."""
        given, outputs = self._kept.get(self._bound_axes, ({}, {}))
        if not given or any(not np.array_equal(given[name], array) for name, array in self._given.items()):
            self._kept.pop(self._bound_axes, None)
            if self._timestep_follows(self._changed):
                self._forget()
            if self._conditioning is not None:
                self._conditioning.run()
                outputs, self._conditioned = self._outputs_of(self._conditioning), True
        self._restart()
        self._pass_on(outputs)

    def _timestep_follows(self, changed: set[str]) -> bool:
        """Whether what depends on the timestep depends on what was written anew as well, as SDXL's added embeddings do."""
        computed = {spec.name for spec in self._conditioning.component.outputs} if self._conditioning else set()
        known = changed - {"sample", "timestep"} | computed
        return self._timestep is not None and any(spec.name in known for spec in self._timestep.component.inputs)

    def _timestep_outputs(self, engine: Engine) -> dict[str, Array]:
        key = self._bound_axes, self._next_timestep
        kept = self._timesteps.get(key)
        if kept is None:
            engine.run()
            kept = self._timesteps[key] = self._outputs_of(engine)
            if len(self._timesteps) > KEPT_TIMESTEPS:
                self._timesteps.popitem(last=False)
        return kept

    @staticmethod
    def _outputs_of(engine: Engine) -> dict[str, Array]:
        return {spec.name: engine.read(spec.name) for spec in engine.component.outputs}

    def _pass_on(self, arrays: Mapping[str, Array]) -> None:
        for name, array in arrays.items():
            for engine in self._readers.get(name, ()):
                engine.write(name, array)

    def _forget(self) -> None:
        """Results of another conditioning are of no use."""
        for key in [key for key in self._timesteps if key[0] == self._bound_axes]:
            del self._timesteps[key]
        self._current = None

    def _restart(self) -> None:
        """Timesteps fall within a picture: one that does not begins another."""
        if isinstance(self._step, CachedStepEngine):
            self._step.restart()

    def _read(self, spec: TensorSpec) -> Array:
        return self._step.read(spec.name)

    def _close(self) -> None:
        for engine in self._parts:
            engine.close()
        self._kept.clear()
        self._timesteps.clear()

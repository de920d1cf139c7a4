"""A denoiser in three engines: what depends on the conditioning, what on the timestep, and the rest of each step.

``latentedge export`` splits the graph (``docs/speed.md``). The parts run only when what they read was written anew.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping

import numpy as np

from latentedge.runtime.bundle import Array, Bundle, Component, TensorSpec, graph_precision
from latentedge.runtime.engines.base import Engine, EngineOptions

#: The parts in the order in which they run; a part that would hold nothing is not there.
PARTS = ("conditioning", "timestep", "step")

#: Timesteps whose results are kept, so that the next picture of the same schedule does not compute them again.
KEPT_TIMESTEPS = 256


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
    components = bundle.manifest.components
    found = {part: components[name] for part in PARTS if (name := part_name(component.name, part)) in components}
    if PARTS[-1] not in found or graph_precision(precision) not in found[PARTS[-1]].variants:
        return None
    engines = {
        part: opener(bundle, spec, precision if part == PARTS[-1] else "fp32", options) for part, spec in found.items()
    }
    return HoistedEngine(component, precision, engines)


class HoistedEngine(Engine):
    """Presents the inputs and outputs of the whole ``component``; ``parts`` are engines by part."""

    def __init__(self, component: Component, precision: str, parts: Mapping[str, Engine]) -> None:
        super().__init__(component, precision)
        self.backend = parts["step"].backend
        self._step = parts["step"]
        self._conditioning = parts.get("conditioning")
        self._timestep = parts.get("timestep")
        self._parts = [parts[name] for name in PARTS if name in parts]
        self._changed: set[str] = set()
        #: The written timestep, and the one whose results the step holds.
        self._next_timestep = b""
        self._current: bytes | None = None
        self._timesteps: OrderedDict[bytes, dict[str, Array]] = OrderedDict()

    def _bind(self) -> None:
        for engine in self._parts:
            engine.bind(**{name: self.axes[name] for name in engine.component.axes})
            for spec in engine.component.inputs:
                if self._shape_only(engine, spec.name):
                    engine.write(spec.name, np.zeros(spec.resolve(self.axes), np.dtype(spec.dtype)))
        self._changed.clear()
        self._forget()

    def _shape_only(self, engine: Engine, name: str) -> bool:
        """Whether a hoisted part takes an input for its shape alone: what read its data would not be in that part."""
        return (name == "sample" and engine is not self._step) or (name == "timestep" and engine is self._conditioning)

    def _write(self, spec: TensorSpec, array: Array) -> None:
        self._changed.add(spec.name)
        for engine in self._parts:
            if engine.component.has_input(spec.name) and not self._shape_only(engine, spec.name):
                engine.write(spec.name, array)
        if spec.name == "timestep":
            self._next_timestep = array.tobytes()

    def _run(self) -> None:
        if self._changed - {"sample", "timestep"}:
            self._forget()
            if self._conditioning is not None:
                self._conditioning.run()
                self._pass_on(self._outputs(self._conditioning))
        if self._timestep is not None and self._next_timestep != self._current:
            self._pass_on(self._timestep_outputs(self._timestep))
            self._current = self._next_timestep
        self._changed.clear()
        self._step.run()

    def _timestep_outputs(self, engine: Engine) -> dict[str, Array]:
        kept = self._timesteps.get(self._next_timestep)
        if kept is None:
            engine.run()
            kept = self._timesteps[self._next_timestep] = self._outputs(engine)
            if len(self._timesteps) > KEPT_TIMESTEPS:
                self._timesteps.popitem(last=False)
        return kept

    @staticmethod
    def _outputs(engine: Engine) -> dict[str, Array]:
        return {spec.name: engine.read(spec.name) for spec in engine.component.outputs}

    def _pass_on(self, arrays: Mapping[str, Array]) -> None:
        for engine in self._parts:
            for name, array in arrays.items():
                if engine.component.has_input(name):
                    engine.write(name, array)

    def _forget(self) -> None:
        """Results of another conditioning or another binding are of no use."""
        self._timesteps.clear()
        self._current = None

    def _read(self, spec: TensorSpec) -> Array:
        return self._step.read(spec.name)

    def _close(self) -> None:
        for engine in self._parts:
            engine.close()
        self._forget()

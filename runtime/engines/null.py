"""An engine that is a Python function, so that everything above engines runs without any engine library."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from latentedge.runtime.bundle import Array, Component, TensorSpec
from latentedge.runtime.engines.base import Engine
from latentedge.runtime.errors import EngineError

#: Takes all inputs by name, returns all outputs by name.
Function = Callable[[Mapping[str, Array]], Mapping[str, Array]]


class NullEngine(Engine):
    """Runs ``function`` on the written inputs and checks what it returns against the component's declaration."""

    backend = "null"

    def __init__(self, component: Component, function: Function) -> None:
        super().__init__(component, precision="fp32")
        self._function = function
        self._inputs: dict[str, Array] = {}
        self._outputs: dict[str, Array] = {}

    def _bind(self) -> None:
        self._inputs.clear()
        self._outputs.clear()

    def _write(self, spec: TensorSpec, array: Array) -> None:
        self._inputs[spec.name] = array.copy()

    def _run(self) -> None:
        outputs = self._function(self._inputs)
        for spec in self.component.outputs:
            array, expected = outputs[spec.name], spec.resolve(self.axes)
            if str(array.dtype) != spec.dtype or array.shape != expected:
                raise EngineError(
                    f"{self.component.name} output {spec.name}: declared {spec.dtype} {list(expected)}, "
                    f"computed {array.dtype} {list(array.shape)}."
                )
            self._outputs[spec.name] = array

    def _read(self, spec: TensorSpec) -> Array:
        if spec.name not in self._outputs:
            raise EngineError(f"{self.component.name}: nothing to read, run() has not been called since bind().")
        return self._outputs[spec.name].copy()

    def _close(self) -> None:
        self._inputs.clear()
        self._outputs.clear()

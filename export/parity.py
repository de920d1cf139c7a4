"""Parity: an exported component against the original on the same inputs, by output, with a floor.

PSNR is ``20 log10(max|reference| / rms(reference - computed))`` over all elements of one output in one case.
"""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from latentedge.export.errors import ExportError
from latentedge.runtime.bundle import Array, Axis, Component
from latentedge.runtime.errors import ParityError
from latentedge.runtime.parity import FLOORS, TensorParity, compare

if TYPE_CHECKING:
    import torch

    from latentedge.export.model import ComponentSource

#: Timesteps that every component with a ``timestep`` input is compared at: both ends, and between two steps.
TIMESTEPS = (0.0, 500.25, 999.0)
SEED = 20240229
#: What a network raises for inputs or settings that it does not take.
FAILURES = (RuntimeError, ValueError, TypeError, IndexError)

Run = Callable[[Mapping[str, Array]], dict[str, Array]]


@dataclass(frozen=True)
class Case:
    """Inputs of one comparison and what the original gives for them (float32, or the declared integer type)."""

    axes: dict[str, int]
    inputs: dict[str, Array]
    outputs: dict[str, Array] = dataclasses.field(default_factory=dict)

    def size(self) -> int:
        """Bytes of all arrays."""
        return sum(array.nbytes for array in (*self.inputs.values(), *self.outputs.values()))


@dataclass(frozen=True)
class Measurement:
    """The worst of each output over all cases."""

    outputs: dict[str, TensorParity]
    cases: int

    @property
    def psnr_db(self) -> float:
        """The lowest PSNR of all outputs."""
        return min(found.psnr_db for found in self.outputs.values())

    @property
    def max_abs_error(self) -> float:
        """The largest absolute error of all outputs."""
        return max(found.max_abs_error for found in self.outputs.values())

    def record(self, floor: float, reference: str, computed_by: str) -> dict[str, Any]:
        """The entry of ``Variant.measured``; ``reference`` and ``computed_by`` say what was compared."""
        return {
            "kind": "parity",
            "psnr_db": round(self.psnr_db, 2),
            "max_abs_error": self.max_abs_error,
            "floor_psnr_db": floor,
            "cases": self.cases,
            "reference": reference,
            "computed_by": computed_by,
            "outputs": {name: dataclasses.asdict(found) for name, found in self.outputs.items()},
        }


def cases_without_reference(source: ComponentSource) -> list[Case]:
    """Inputs to compare on: the traced axes, the further ones, and for a denoiser several timesteps."""
    component = source.spec
    trace = source.trace_axes or {name: axis.opt for name, axis in component.axes.items()}
    cases = []
    for index, axes in enumerate((trace, *(source.compare_axes or default_compare_axes(component.axes, trace)))):
        _check_axes(component, axes)
        inputs = source.sample_inputs(axes, np.random.default_rng(SEED + index))
        component.axes_of(inputs)
        cases.append(Case(dict(axes), inputs))
    _check_variety(component, cases)
    if component.has_input("timestep"):
        smallest = min(cases, key=Case.size)
        dtype = component.input("timestep").dtype
        cases += [
            Case(smallest.axes, {**smallest.inputs, "timestep": np.full_like(smallest.inputs["timestep"], step, dtype)})
            for step in (max(step, source.lowest_timestep) for step in TIMESTEPS)
        ]
    return cases


def with_reference(module: torch.nn.Module, component: Component, cases: list[Case]) -> Iterator[Case]:
    """The same cases with the outputs of the torch module; :class:`ParityError` when these are not finite."""
    import torch

    for case in cases:
        arguments = [torch.from_numpy(case.inputs[spec.name]) for spec in component.inputs]
        try:
            with torch.no_grad():
                result = module(*arguments)
        except FAILURES as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ExportError(
                f"{component.name}: the original fails with {case.axes}: {reason}",
                hint="the declared axes allow sizes that the network does not take",
            ) from error
        tensors = result if isinstance(result, (tuple, list)) else (result,)
        outputs: dict[str, Array] = {}
        for spec, tensor in zip(component.outputs, tensors, strict=True):
            array = tensor.numpy()
            expected = spec.resolve(case.axes)
            if array.shape != expected or array.dtype != np.dtype(spec.dtype):
                raise ExportError(
                    f"{component.name} output {spec.name}: declared {spec.dtype} {list(expected)} for {case.axes}, "
                    f"the original gives {array.dtype} {list(array.shape)}."
                )
            if not np.isfinite(array).all():
                raise ParityError(
                    f"{component.name}: the original itself gives {_not_finite(array)} of {array.size} values of "
                    f"{spec.name} that are not finite, so nothing can be compared with it.",
                    hint="the checkpoint's weights are damaged, or overflowed when they were saved in half precision",
                )
            outputs[spec.name] = array.copy()
        yield Case(case.axes, case.inputs, outputs)
        gc.collect()


def measure(run: Run, cases: list[Case]) -> Measurement:
    """Run every case and keep the worst of each output."""
    worst: dict[str, TensorParity] = {}
    for case in cases:
        computed = run(case.inputs)
        for name, reference in case.outputs.items():
            found = compare(reference, computed[name])
            worst[name] = found.worse_of(worst[name]) if name in worst else found
    return Measurement(worst, len(cases))


def require(component: str, precision: str, measurement: Measurement) -> None:
    """:class:`ParityError` naming the worst output when it lies below the precision's floor."""
    floor = FLOORS[precision]
    if measurement.psnr_db >= floor:
        return
    name, found = min(measurement.outputs.items(), key=lambda item: item[1].psnr_db)
    raise ParityError(
        f"{component} in {precision} does not reproduce the original: {name} has {found.describe()}, "
        f"the floor is {floor:g} dB.",
        hint="nothing was written; the export of this component to ONNX is wrong or its numbers overflow",
    )


def _check_axes(component: Component, axes: Mapping[str, int]) -> None:
    for name, length in axes.items():
        axis = component.axes.get(name)
        if axis is None or not axis.min <= length <= axis.max or length % axis.multiple:
            raise ExportError(f"{component.name} cannot be compared with {name} = {length}: its axes do not allow it.")


def _check_variety(component: Component, cases: list[Case]) -> None:
    """Every axis that may vary must vary among the cases: a length that was never compared is not proven."""
    for name, axis in component.axes.items():
        if axis.min < axis.max and len({case.axes[name] for case in cases}) < 2:
            raise ExportError(f"{component.name}: the axis {name} may vary, but is compared with one length only.")


def default_compare_axes(axes: Mapping[str, Axis], trace: Mapping[str, int]) -> tuple[dict[str, int], ...]:
    """Axes to compare on beside the traced ones: one case with every length changed, as small as allowed."""
    changed = {}
    for name, axis in axes.items():
        candidates = [trace[name] - axis.multiple, trace[name] + axis.multiple]
        changed[name] = next((c for c in candidates if axis.min <= c <= axis.max), trace[name])
    return (changed,) if changed != dict(trace) else ()


def _not_finite(array: Array) -> int:
    return int(array.size - np.isfinite(array).sum())

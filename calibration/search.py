"""Chooses each activation's range, balancing and bias correction by the measured error of the outputs that read it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from latentedge.calibration import smoothing
from latentedge.calibration.graph import Layer, constant, node_by_name, value_by_name
from latentedge.calibration.layers import Run, attributes_of, fake_quantise, layer_run, relative_error, rows_of
from latentedge.calibration.observers import TensorStatistics
from latentedge.calibration.placement import SMALLEST_WIDTH, Placed, place
from latentedge.calibration.plan import ActivationPlan
from latentedge.calibration.ranges import OBSERVERS
from latentedge.calibration.weights import quantise_weight
from latentedge.runtime.bundle import Array

#: Exponents of the balancing that are tried.
EXPONENTS = (0.5, 0.65, 0.8)
#: Balancing is taken where it lowers the error to this fraction: it also changes a norm.
WORTHWHILE = 0.9
#: Fractions of the balanced maximum that are tried.
BALANCED_CLIPS = (1.0, 0.85, 0.7)


@dataclass(frozen=True)
class SearchSettings:
    """Which rules compete; leaving some out is for comparison."""

    observers: tuple[str, ...] = tuple(OBSERVERS)
    balance: bool = True
    clip_weights: bool = True
    correct_bias: bool = True


@dataclass
class SearchResult:
    """Ranges by activation, bias corrections by layer, and shortcut convolutions better cut in two."""

    activations: dict[str, ActivationPlan] = field(default_factory=dict)
    bias: dict[str, Array] = field(default_factory=dict)
    split: list[str] = field(default_factory=list)


@dataclass
class _Reader:
    """A layer that reads an activation, ready to be run alone."""

    layer: Layer
    weight: Array
    run: Run


class Search:
    """Judges the layers of one graph by activations that ``fetch`` gives for each probe."""

    def __init__(
        self,
        model: ir.Model,
        statistics: Mapping[str, TensorStatistics],
        settings: SearchSettings,
    ) -> None:
        self.statistics = statistics
        self.settings = settings
        self.nodes = node_by_name(model)
        self.values = value_by_name(model)
        self.placed = place(model)
        self.groups: dict[str, list[Placed]] = {}
        for entry in self.placed:
            self.groups.setdefault(entry.layer.activation, []).append(entry)
        self._runs: dict[str, Run] = {}

    def run(
        self,
        fetched: Sequence[Mapping[str, Array]],
        unusable: Iterable[str],
        progress: Callable[[int, int], None] | None = None,
    ) -> SearchResult:
        """Settings for every activation that a quantisable layer reads, except the ``unusable`` ones and those whose layers
        give values that are not finite.

        ``fetched`` holds the activations of each probe by tensor name.
        """
        result = SearchResult()
        excluded = set(unusable)
        wanted = [
            (tensor, [entry for entry in group if entry.kept is None])
            for tensor, group in self.groups.items()
            if tensor not in excluded and tensor in self.statistics and any(entry.kept is None for entry in group)
        ]
        for index, (tensor, group) in enumerate(wanted):
            self._activation(tensor, group, [probe[tensor] for probe in fetched], result)
            if tensor in result.activations:
                self._splits(group, fetched, excluded, result)
            if progress is not None:
                progress(index + 1, len(wanted))
        return result

    def _readers(self, group: list[Placed]) -> list[_Reader]:
        readers = []
        for entry in group:
            node = self.nodes[entry.layer.node]
            weight = constant(node.inputs[1])
            assert weight is not None
            if entry.layer.name not in self._runs:
                self._runs[entry.layer.name] = layer_run(entry.layer, attributes_of(node))
            readers.append(_Reader(entry.layer, np.asarray(weight, np.float32), self._runs[entry.layer.name]))
        return readers

    def _activation(self, tensor: str, group: list[Placed], data: list[Array], result: SearchResult) -> None:
        statistics = self.statistics[tensor]
        readers = self._readers(group)
        inputs = [rows_of(readers[0].layer, array) for array in data]
        references = [[reader.run(rows, reader.weight) for rows in inputs] for reader in readers]
        if not all(np.isfinite(output).all() for outputs in references for output in outputs):
            return
        error: dict[str, float] = {}
        amax = {name: OBSERVERS[name](statistics) for name in self.settings.observers}
        for name, value in amax.items():
            quantised = [fake_quantise(rows, value) for rows in inputs]
            error[name] = _mean_error(readers, quantised, references)
        rule = min(error, key=lambda name: error[name])
        plain = error.get("absmax")
        best = ActivationPlan(amax[rule], rule, None, error[rule], plain)
        if self.settings.balance:
            best = self._balanced(tensor, readers, inputs, references, best)
        result.activations[tensor] = best
        if self.settings.correct_bias:
            self._bias(tensor, readers, inputs, references, best, result)

    def _balanced(
        self,
        tensor: str,
        readers: list[_Reader],
        inputs: list[Array],
        references: list[list[Array]],
        best: ActivationPlan,
    ) -> ActivationPlan:
        """The best balancing of this activation, if it is worthwhile; weights are quantised in the comparison."""
        every = [entry.layer for entry in self.groups[tensor]]
        affine = smoothing.affine_of(self.values[tensor], every)
        if affine is None:
            return best
        statistics = self.statistics[tensor]
        weights = [np.asarray(constant(self.nodes[layer.node].inputs[1])) for layer in every]
        largest = smoothing.weight_amax([(w, layer.input_axis) for w, layer in zip(weights, every, strict=True)])
        plain = [self._quantised(reader, reader.weight, None) for reader in readers]
        base = _mean_error(readers, [fake_quantise(rows, best.amax) for rows in inputs], references, plain)
        found, least = best, base * WORTHWHILE
        for exponent in EXPONENTS:
            factor = smoothing.factors(statistics.channel_amax, largest, exponent)
            along = [1] * inputs[0].ndim
            along[readers[0].layer.feature_axis] = -1
            scaled = [rows / factor.reshape(along) for rows in inputs]
            quantised = [
                self._quantised(reader, smoothing.multiplied(reader.weight, reader.layer.input_axis, factor), factor)
                for reader in readers
            ]
            top = float((statistics.channel_amax / factor).max())
            for clip in BALANCED_CLIPS:
                data = [fake_quantise(rows, top * clip) for rows in scaled]
                error = _mean_error(readers, data, references, quantised)
                if error < least:
                    least = error
                    found = ActivationPlan(top * clip, f"balanced {clip:g}", exponent, error, best.plain)
        return found

    def _quantised(self, reader: _Reader, weight: Array, factor: Array | None) -> Array:
        power = self.statistics[reader.layer.activation].channel_power()
        power = power if factor is None else power / np.square(factor)
        layer = reader.layer
        return quantise_weight(
            weight, layer.channel_axis, layer.input_axis, power, clip=self.settings.clip_weights
        ).dequantised()

    def _bias(
        self,
        tensor: str,
        readers: list[_Reader],
        inputs: list[Array],
        references: list[list[Array]],
        plan: ActivationPlan,
        result: SearchResult,
    ) -> None:
        """Mean error of each output channel, kept where it lowers the error of probes that it was not taken from."""
        factor: Array | None = None
        rows = inputs
        if plan.smoothing is not None:
            every = [entry.layer for entry in self.groups[tensor]]
            weights = [np.asarray(constant(self.nodes[layer.node].inputs[1])) for layer in every]
            largest = smoothing.weight_amax([(w, layer.input_axis) for w, layer in zip(weights, every, strict=True)])
            factor = smoothing.factors(self.statistics[tensor].channel_amax, largest, plan.smoothing)
            along = [1] * inputs[0].ndim
            along[readers[0].layer.feature_axis] = -1
            rows = [array / factor.reshape(along) for array in inputs]
        quantised = [fake_quantise(array, plan.amax) for array in rows]
        for reader, reference in zip(readers, references, strict=True):
            if reader.layer.bias is None:
                continue
            scaled = (
                reader.weight
                if factor is None
                else smoothing.multiplied(reader.weight, reader.layer.input_axis, factor)
            )
            weight = self._quantised(reader, scaled, factor)
            outputs = [reader.run(array, weight) for array in quantised]
            axis = -1 if reader.layer.linear else 1
            correction = channel_correction(reference, outputs, axis)
            if correction is not None:
                result.bias[reader.layer.name] = correction

    def _splits(
        self, group: list[Placed], fetched: Sequence[Mapping[str, Array]], excluded: set[str], result: SearchResult
    ) -> None:
        """Shortcut convolutions on a Concat: one range for all inputs, or one for each, whichever errs less."""
        for entry in group:
            if not entry.split:
                continue
            parts = list(entry.split)
            if excluded & set(parts) or any(part not in self.statistics for part in parts):
                continue
            if min(self.statistics[part].channel_amax.size for part in parts) < SMALLEST_WIDTH:
                continue
            reader = self._readers([entry])[0]
            data = [probe[entry.layer.activation] for probe in fetched]
            references = [[reader.run(rows_of(entry.layer, array), reader.weight) for array in data]]
            ranges = {
                part: min(
                    (OBSERVERS[name](self.statistics[part]) for name in self.settings.observers),
                    key=lambda amax, part=part: sum(  # type: ignore[misc]
                        float(np.square(fake_quantise(probe[part], amax) - probe[part]).sum()) for probe in fetched
                    ),
                )
                for part in parts
            }
            joined = [
                np.concatenate([fake_quantise(probe[part], ranges[part]) for part in parts], axis=1)
                for probe in fetched
            ]
            shared = result.activations[entry.layer.activation]
            whole = [fake_quantise(array, shared.amax) for array in data]
            if _mean_error([reader], joined, references) < _mean_error([reader], whole, references) * WORTHWHILE:
                result.split.append(entry.layer.name)
                # The correction was measured with one range for the whole convolution.
                result.bias.pop(entry.layer.name, None)
                for part in parts:
                    result.activations.setdefault(part, ActivationPlan(ranges[part], "split"))


def channel_correction(references: list[Array], outputs: list[Array], axis: int) -> Array | None:
    """What to add to each channel of ``outputs``, float64 [C]: the mean difference over half of the probes.

    ``None`` where that does not lower the squared error of the other half, or where there are fewer than two probes.
    """
    if len(references) < 2:
        return None

    def mean(pairs: list[tuple[Array, Array]]) -> Array:
        differences = [np.moveaxis(a.astype(np.float64) - b, axis, 0).reshape(a.shape[axis], -1) for a, b in pairs]
        return np.asarray(np.concatenate(differences, axis=1).mean(axis=1))

    pairs = list(zip(references, outputs, strict=True))
    fitted, held = mean(pairs[0::2]), mean(pairs[1::2])
    # Adding c to a channel changes its mean squared error by c^2 - 2 c m, with m the mean difference.
    if float(np.sum(fitted**2 - 2 * fitted * held)) >= 0:
        return None
    return mean(pairs)


def _mean_error(
    readers: list[_Reader], inputs: list[Array], references: list[list[Array]], weights: list[Array] | None = None
) -> float:
    """Relative squared error of the outputs, averaged over layers and probes."""
    errors = []
    for index, reader in enumerate(readers):
        weight = reader.weight if weights is None else weights[index]
        errors += [
            relative_error(reference, reader.run(data, weight))
            for reference, data in zip(references[index], inputs, strict=True)
        ]
    return float(np.mean(errors))

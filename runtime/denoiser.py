"""The UNet with its conditioning and guidance, as the ``model(sample, timestep)`` that a sampler drives."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from latentedge.runtime.bundle import Array
from latentedge.runtime.engines.base import Engine
from latentedge.runtime.samplers.plans import Plan
from latentedge.runtime.tiles import tiled

#: Turns the branches' outputs, in the order of the branches, into one model output.
Combine = Callable[[Sequence[Array]], Array]


@dataclass(frozen=True)
class Branch:
    """One evaluation of guidance: constant UNet inputs by name, and what is appended to ``sample``."""

    inputs: dict[str, Array] = field(default_factory=dict)
    concat: Array | None = None


class Denoiser:
    """Evaluates every branch in one batch, or one after the other where memory is short.

    Embeddings are written once for each binding, sample and timestep at each call. ``conditional`` is the index of
    the branch that is left when guidance is off. With ``tile``, latents that are larger are evaluated in overlapping
    tiles of that side, conditioning pictures cut along, and the outputs are blended in every call: the joint
    diffusion of Bar-Tal et al. 2023 (arXiv 2302.08113).
    """

    def __init__(
        self,
        engine: Engine,
        branches: Sequence[Branch],
        combine: Combine,
        *,
        conditional: int = 0,
        separate: bool = False,
        tile: int | None = None,
    ) -> None:
        self._engine = engine
        self._branches = tuple(branches)
        self._all = tuple(range(len(self._branches)))
        self._combine = combine
        self._conditional = conditional
        self._separate = separate
        self._tile = tile
        self._written: tuple[tuple[int, ...], tuple[int, ...]] | None = None
        self._timesteps = np.zeros(0, np.float32)
        self._stacked: dict[tuple[int, ...], dict[str, Array]] = {}
        self._axes: dict[tuple[tuple[int, ...], tuple[int, ...]], dict[str, int]] = {}
        self._concat_scale = np.float32(1)

    def __call__(self, sample: Array, timestep: float) -> Array:
        """Guided model output, float32 ``[N, C, h, w]``, for ``sample`` as the sampler scaled it."""
        return self._combine(self.evaluate(sample, timestep, self._all))

    def following(self, plan: Iterable[float | None]) -> Callable[[Array, float], Array]:
        """The same model, each evaluation with the branches that ``guidance.planned`` names for it."""
        shares, differences = iter(plan), list[Array]()

        def model(sample: Array, timestep: float) -> Array:
            share = next(shares)
            if share is None:
                outputs = self.evaluate(sample, timestep, self._all)
                differences[:] = [outputs[self._conditional] - output for output in outputs]
                return self._combine(outputs)
            (output,) = self.evaluate(sample, timestep, (self._conditional,))
            if share == 0:
                return output
            return self._combine([output - np.float32(share) * difference for difference in differences])

        return model

    def scaling_concat(self, plan: Plan, begin: int) -> Callable[[Array, float], Array]:
        """The same model, what is appended scaled like the sample; ``begin`` is the run's first index in ``plan``."""
        indices, one = itertools.count(begin), np.ones(1, np.float32)

        def model(sample: Array, timestep: float) -> Array:
            self._concat_scale = np.float32(plan.scaled_input(one, next(indices)).item())
            return self(sample, timestep)

        return model

    def evaluate(self, sample: Array, timestep: float, chosen: tuple[int, ...]) -> list[Array]:
        """The outputs of the ``chosen`` branches, by index."""
        sample = np.ascontiguousarray(sample, np.float32)
        if self._separate:
            return [self._run(sample, timestep, (index,))[0] for index in chosen]
        return self._run(sample, timestep, chosen)

    def _run(self, sample: Array, timestep: float, chosen: tuple[int, ...]) -> list[Array]:
        stacked = np.concatenate([self._with_concat(sample, self._branches[index]) for index in chosen])
        if self._tile is None or max(sample.shape[2:]) <= self._tile:
            output = self._output(stacked, timestep, chosen)
        else:
            output = tiled(
                lambda piece: self._output(piece, timestep, chosen), stacked, self._tile, self._overlap(self._tile), 1
            )
        return [output[row : row + len(sample)] for row in range(0, len(output), len(sample))]

    def _overlap(self, tile: int) -> int:
        """At least a quarter of a tile, in steps that the network's own halvings do not shift against each other."""
        multiple = max(axis.multiple for axis in self._engine.component.axes.values())
        return -(-tile // (4 * multiple)) * multiple

    def _output(self, stacked: Array, timestep: float, chosen: tuple[int, ...]) -> Array:
        # Between two evaluations the caches hold the network: what is done here in each is kept short.
        if self._engine.writer is not self or self._written != (chosen, stacked.shape):
            self._begin(stacked, chosen)
        self._timesteps.fill(timestep)
        self._engine.write("sample", stacked)
        self._engine.write("timestep", self._timesteps)
        self._engine.run()
        return self._engine.read("out_sample")

    def _begin(self, stacked: Array, chosen: tuple[int, ...]) -> None:
        """Bind the engine for ``stacked`` and write what stays; an engine that is bound anew has another writer."""
        self._timesteps = np.zeros(len(stacked), np.float32)
        constants, shape = self._constants(chosen), stacked.shape
        # Solved once for each shape: ``write`` checks every array all the same.
        if (chosen, shape) not in self._axes:
            arrays = {"sample": stacked, "timestep": self._timesteps, **constants}
            self._axes[chosen, shape] = self._engine.component.axes_of(arrays)
        self._engine.bind(**self._axes[chosen, shape])
        for name, array in constants.items():
            self._engine.write(name, array)
        self._engine.writer, self._written = self, (chosen, shape)

    def _constants(self, chosen: tuple[int, ...]) -> dict[str, Array]:
        if chosen not in self._stacked:
            branches = [self._branches[index].inputs for index in chosen]
            self._stacked[chosen] = {
                name: np.ascontiguousarray(np.concatenate([inputs[name] for inputs in branches]))
                for name in branches[0]
            }
        return self._stacked[chosen]

    def _with_concat(self, sample: Array, branch: Branch) -> Array:
        if branch.concat is None:
            return sample
        return np.concatenate([sample, branch.concat * self._concat_scale], axis=1)

"""Pictures that one component is judged by: drawn with it on trial, and everything else as it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from latentedge.calibration.capture import DECODER
from latentedge.calibration.metrics import psnr
from latentedge.calibration.pictures import Drawn, draw
from latentedge.runtime.bundle import Array, Bundle
from latentedge.runtime.engines import Engine, EngineOptions
from latentedge.runtime.pipeline import Pipeline


@dataclass(frozen=True)
class Target:
    """The engine that the plan is made for, and where it is measured.

    ``precision`` names the int8 graph there ("int8", "int8+bf16"), ``alternative`` the float precision to beat.
    ``timed``: whether this machine is the target; otherwise gains are unknown and errors come from another engine.
    """

    backend: str
    precision: str
    alternative: str
    threads: int | None = None
    timed: bool = True
    seconds: float = 4.0

    @property
    def options(self) -> EngineOptions:
        """How engines are opened."""
        return EngineOptions(threads=self.threads)


class Studio(Pipeline):
    """A pipeline with one component lent to it: the other networks are loaded once for all candidates."""

    def __init__(self, bundle: Bundle, target: Target, precision: str = "fp32") -> None:
        super().__init__(bundle, target.backend, precision, target.options)
        self.borrowed: Engine | None = None

    def __enter__(self) -> Studio:
        return self

    def engine(self, component: str) -> Engine:
        """The borrowed engine for its component; for the others what the pipeline's precision means for them."""
        borrowed = self.borrowed
        return borrowed if borrowed is not None and component == borrowed.component.name else super().engine(component)

    def drawn(self, engine: Engine | None, requests: Sequence[dict[str, Any]]) -> Drawn:
        """Draw with ``engine`` in its component's place; ``None``: with the bundle's own."""
        self.borrowed = engine
        return draw(self, requests)

    def decoded(self, engine: Engine | None, latents: Array) -> Drawn:
        """The pictures of final latents ``[N, C, h, w]``, decoded one by one with ``engine``."""
        self.borrowed = engine
        pictures = [self.decode(latents[index : index + 1]) for index in range(len(latents))]
        return Drawn(np.concatenate(pictures), [latents])


@dataclass(frozen=True)
class Scene:
    """The requests that a component is judged by, and their pictures in fp32.

    A decoder is judged on the latents that fp32 trajectories ended in, so these are drawn once.
    """

    studio: Studio
    component: str
    requests: Sequence[dict[str, Any]]
    reference: Drawn

    @classmethod
    def of(
        cls, studio: Studio, component: str, requests: Sequence[dict[str, Any]], engine: Engine | None = None
    ) -> Scene:
        """The scene of ``requests``; ``engine`` is the component's in fp32 where it is open already."""
        reference = studio.drawn(engine, requests)
        if component == DECODER:
            reference = studio.decoded(engine, reference.latents[-1])
        return cls(studio, component, requests, reference)

    def drawn(self, engine: Engine, studio: Studio | None = None) -> Drawn:
        """The same requests with ``engine`` in the component's place, in this or in another studio."""
        studio = studio or self.studio
        if self.component == DECODER:
            return studio.decoded(engine, self.reference.latents[-1])
        return studio.drawn(engine, self.requests)

    def exchanged(self, drawn: Drawn, studio: Studio) -> list[float]:
        """PSNR in dB of pictures whose final latents carry the errors of the others in ``drawn``: many for a few.

        Of a denoiser before a codebook, where an error that carries one vector over a border makes a picture jump: a
        few pictures in a hundred, which no sixteen show. Nothing of others, whose pictures follow their latents.
        """
        latents = self.reference.latents[-1]
        if self.component == DECODER or studio.bundle.latent.encoding != "vq":
            return []
        errors = drawn.latents[-1] - latents
        exact = studio.decoded(None, latents).pictures
        return [
            psnr(one, other)
            for turn in range(1, len(latents))
            for one, other in zip(
                exact, studio.decoded(None, latents + np.roll(errors, turn, axis=0)).pictures, strict=True
            )
        ]

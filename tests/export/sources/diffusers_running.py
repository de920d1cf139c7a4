"""One tiny pipeline twice: as diffusers runs it, and through the source and the runtime with torch as the engine."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from latentedge.export.bundle_writer import write_manifest, write_tokenizer
from latentedge.export.model import ComponentSource, SourceModel
from latentedge.runtime.bundle import Array, Bundle, Manifest
from latentedge.runtime.engines.null import NullEngine
from latentedge.runtime.pipeline import Pipeline


def torch_function(component: ComponentSource) -> Callable[[Mapping[str, Array]], Mapping[str, Array]]:
    """The component's module as an engine's function."""
    assert component.build is not None
    module = component.build()

    def run(inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        with torch.no_grad():
            outputs = module(*(torch.from_numpy(inputs[spec.name]) for spec in component.spec.inputs))
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return {
            spec.name: np.ascontiguousarray(array.numpy())
            for spec, array in zip(component.spec.outputs, outputs, strict=True)
        }

    return run


def torch_pipeline(model: SourceModel, folder: Path) -> Pipeline:
    """A pipeline over the source's own modules, without any export."""
    folder.mkdir(parents=True)
    tokenizers = {name: write_tokenizer(folder, name, source) for name, source in model.tokenizers.items()}
    manifest = Manifest(
        family=model.family,
        task=model.task,
        source=model.source,
        created_with={},
        latent=model.latent,
        conditioning=model.conditioning,
        schedule=dict(model.schedule),
        defaults=model.defaults,
        components={component.spec.name: component.spec for component in model.components},
        tokenizers=tokenizers,
    )
    write_manifest(folder, manifest)
    bundle = Bundle.open(folder)
    engines = {part.spec.name: NullEngine(part.spec, torch_function(part)) for part in model.components}
    return Pipeline(bundle, "null", "fp32", engines=engines)


class Recorder:
    """Every normal draw that diffusers takes, in order."""

    def __init__(self) -> None:
        self.draws: list[Array] = []

    def noise(self, count: int) -> Array:
        """The last ``count`` draws, stacked."""
        return np.stack(self.draws[len(self.draws) - count :])


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """diffusers' ``randn_tensor`` in every module that has imported it, recorded."""
    from diffusers.utils import torch_utils

    found = Recorder()
    original = torch_utils.randn_tensor

    def recorded(*arguments: Any, **options: Any) -> torch.Tensor:
        draw = original(*arguments, **options)
        found.draws.append(draw.float().numpy().copy())
        return draw

    for name, module in list(sys.modules.items()):
        if name.startswith("diffusers.") and getattr(module, "__dict__", {}).get("randn_tensor") is original:
            monkeypatch.setattr(module, "randn_tensor", recorded)
    return found


class Spy:
    """The last latents before decoding, whichever pipeline runs."""

    def __init__(self, autoencoder: Any, scale: float) -> None:
        self.latents: Array | None = None
        decode = autoencoder.decode

        def spied(latents: torch.Tensor, *arguments: Any, **options: Any) -> Any:
            self.latents = (latents * scale).numpy().copy()
            return decode(latents, *arguments, **options)

        autoencoder.decode = spied

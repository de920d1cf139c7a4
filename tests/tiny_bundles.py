"""Small bundles around a few components, and graph files for them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from latentedge.runtime.bundle import (
    MANIFEST_NAME,
    Bundle,
    Component,
    Conditioning,
    Defaults,
    Latent,
    Manifest,
    Source,
    Variant,
    file_sha256,
)

#: The schedule of Stable Diffusion's checkpoints, in diffusers' dialect.
SCHEDULE = {"_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear", "beta_start": 0.00085,
            "beta_end": 0.012, "clip_sample": False, "set_alpha_to_one": False, "dialect": "diffusers"}  # fmt: skip


def manifest_of(*components: Component, **changes: Any) -> Manifest:
    """A manifest of ``components``; ``changes`` are its other fields."""
    manifest = Manifest(
        family="test",
        task="text-to-image",
        source=Source("test", {}),
        created_with={},
        latent=Latent(4, 8),
        conditioning=Conditioning(),
        schedule={},
        defaults=Defaults(32, 32),
        components={component.name: component for component in components},
    )
    return dataclasses.replace(manifest, **changes)


def write_bundle(folder: Path, *components: Component, **changes: Any) -> Bundle:
    """Write the manifest of ``components`` into ``folder`` and open it; their files are there already."""
    (folder / MANIFEST_NAME).write_text(json.dumps(manifest_of(*components, **changes).to_json()), encoding="utf-8")
    return Bundle.open(folder)


def write_graph(folder: Path, relative: str, content: bytes) -> Variant:
    """Write a graph file into the bundle's folder, and give its record."""
    path = folder / relative
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return Variant(relative, file_sha256(path), len(content))

"""``latentedge inspect``: what is in a bundle."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from latentedge.runtime.bundle import Axis, Bundle, Component, Manifest, TensorSpec, Variant


def describe(bundle: Bundle) -> Iterator[str]:
    """The manifest as lines for a person."""
    manifest = bundle.manifest
    yield f"{bundle.path}: {manifest.family}, {manifest.task}"
    yield from _fields(manifest)
    for component in manifest.components.values():
        yield from _component(component)
    for name, tokenizer in manifest.tokenizers.items():
        yield f"{name}: {tokenizer.path}, {tokenizer.length} tokens, {len(tokenizer.golden)} recorded prompts"


def _fields(manifest: Manifest) -> Iterator[str]:
    latent, conditioning, defaults = manifest.latent, manifest.conditioning, manifest.defaults
    source = manifest.source
    yield f"  source        {source.layout}: {', '.join(source.files) or 'no files recorded'}"
    yield f"  licence       {source.licence or 'unknown'}"
    for note in source.notes:
        yield f"  note          {note}"
    yield f"  made with     {', '.join(f'{name} {version}' for name, version in manifest.created_with.items())}"
    yield (
        f"  latent        {latent.channels} channels, 1/{latent.downscale} of the picture, "
        f"scale {latent.scale_factor:g}, {latent.encoding}"
    )
    concat = ", ".join(f"{item.source} ({item.channels})" for item in conditioning.concat)
    yield f"  conditioning  {conditioning.cross_attention}{f'; concatenated: {concat}' if concat else ''}"
    yield f"  guidance      {_guidance(manifest)}"
    yield f"  schedule      {_schedule(manifest.schedule)}"
    yield (
        f"  defaults      {defaults.width}x{defaults.height}, {defaults.sampler or 'the schedule'}'s sampler, "
        f"{defaults.steps} steps, guidance {defaults.guidance_scale:g}"
    )


def _guidance(manifest: Manifest) -> str:
    kind = manifest.conditioning.unconditional
    return "none: this model was not trained for it" if kind == "none" else f"against {kind.replace('_', ' ')}"


def _schedule(schedule: dict[str, Any]) -> str:
    own = schedule.get("trained_betas") is not None
    betas = ("trained_betas",) if own else ("beta_schedule", "beta_start", "beta_end")
    shown = ("dialect", "_class_name", *betas, "prediction_type")
    schedule = {**schedule, "trained_betas": "of its own"}
    return ", ".join(f"{name} {schedule[name]}" for name in shown if name in schedule) or "none"


def _component(component: Component) -> Iterator[str]:
    yield f"{component.name}"
    for arrow, specs in (("in ", component.inputs), ("out", component.outputs)):
        for spec in specs:
            yield f"  {arrow} {_tensor(spec)}"
    for name, axis in component.axes.items():
        yield f"  {name}: {_axis(axis)}"
    for precision, variant in component.variants.items():
        yield f"  {precision:5} {_variant(variant)}"
    if "note" in component.parity:
        yield f"  parity: {component.parity['note']}"


def _tensor(spec: TensorSpec) -> str:
    return f"{spec.name} {spec.dtype} [{', '.join(map(str, spec.shape))}]"


def _axis(axis: Axis) -> str:
    multiple = f", a multiple of {axis.multiple}" if axis.multiple > 1 else ""
    return f"{axis.min} to {axis.max}, best at {axis.opt}{multiple}"


def _variant(variant: Variant) -> str:
    parts = [f"{variant.path} {variant.size / 1e6:.1f} MB"]
    for record in variant.measured:
        if record.get("kind") == "parity" and "psnr_db" in record:
            parts.append(f"{record['psnr_db']:.1f} dB against the original (floor {record['floor_psnr_db']:g})")
        if record.get("kind") == "float32_nodes" and record["float32"]:
            parts.append(f"{record['float32']} of {record['nodes']} nodes in float32")
        if record.get("kind") == "latency":
            parts.append(f"{1000 * record['seconds']:.1f} ms with {record['backend']}")
    return ", ".join(parts)


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Write the manifest to stdout as JSON.")
def inspect(bundle: Path, as_json: bool) -> None:
    """Show what is in a bundle: networks, tensors, sizes, precisions and how they were measured."""
    opened = Bundle.open(bundle)
    if as_json:
        click.echo(json.dumps(opened.manifest.to_json(), indent=2, ensure_ascii=False))
        return
    for line in describe(opened):
        click.echo(line)

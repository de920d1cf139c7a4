"""Measured results written into a bundle's manifest, where ``runtime.selection`` finds them."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from latentedge.benchmarks.processes import MeasuredProcess
from latentedge.export.bundle_writer import write_manifest
from latentedge.runtime.bundle import Array, Bundle, Manifest, graph_precision
from latentedge.runtime.selection import DENOISER, good_enough

#: Pictures that a precision's quality is judged by, and the PSNR in dB that the worst must reach: 30 dB is a root mean
#: square difference of 8 of 255 levels, a picture with the same content and the same detail.
SEEDS = (0, 1, 2, 3)
FLOOR_DB = 30.0

#: What makes a newer record of the same thing replace an older one.
IDENTITY = (
    "kind",
    "backend",
    "precision",
    "machine",
    "library",
    "low_memory",
    "tile",
    "height",
    "width",
    "interval",
    "full",
    "guidance_interval",
    "guidance_every",
    "steps",
)


def record(bundle: Bundle, report: Mapping[str, Any], notify: Callable[[str], None]) -> None:
    """Write a latency record for every measured setting, and a quality record where a precision has none.

    Latency is that of a whole picture against the report's first setting, in shared rounds. A backend with settings of
    its own is not recorded: "auto" opens none.
    """
    manifest = Bundle.open(bundle.path).manifest
    rows = [row for row in report["rows"] if "samples" in row and ":" not in row["backend"]]
    for row in rows:
        manifest = with_record(manifest, row["precision"], latency_record(report, row))
    write_manifest(bundle.path, manifest)
    reference: dict[str, Array] = {}
    for row in rows:
        component = manifest.components[DENOISER]
        if row["precision"] == "fp32" or good_enough(component, row["backend"], row["precision"]):
            continue
        notify(f"quality of {row['backend']} {row['precision']}")
        if not reference:
            reference.update(pictures(bundle, rows[0], "fp32", report))
        found = quality_record(row, reference, pictures(bundle, row, row["precision"], report))
        notify(f"{row['backend']} {row['precision']}: worst picture {found['psnr_worst_db']:.1f} dB")
        manifest = with_record(manifest, row["precision"], found)
        write_manifest(bundle.path, manifest)


def latency_record(report: Mapping[str, Any], row: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest's record of one measured row."""
    return {
        "kind": "latency",
        "backend": row["backend"],
        "precision": row["precision"],
        "machine": report["fingerprint"],
        "library": report["libraries"][row["backend"]],
        "seconds": row["picture"]["p50"],
        "reference": row["ratio"]["reference"],
        "ratio": row["ratio"]["ratio"],
        "ratio_low": row["ratio"]["low"],
        "rounds": report["rounds"],
    }


def quality_record(
    row: Mapping[str, Any], reference: Mapping[str, Array], found: Mapping[str, Array]
) -> dict[str, Any]:
    """PSNR of a precision's pictures against the fp32 ones of the same noise: mean and worst."""
    values = [psnr_db(reference[seed], found[seed]) for seed in reference]
    return {
        "kind": "quality",
        "backend": row["backend"],
        "precision": row["precision"],
        "psnr_db": float(np.mean(values)),
        "psnr_worst_db": float(np.min(values)),
        "floor_db": FLOOR_DB,
        "pictures": len(values),
    }


def psnr_db(reference: Array, found: Array) -> float:
    """``-20 log10(rms difference)`` of pictures in 0..1, at most 100."""
    rms = float(np.sqrt(np.mean(np.square(reference.astype(np.float64) - found))))
    return 100.0 if rms < 1e-5 else -20 * float(np.log10(rms))


def pictures(bundle: Bundle, row: Mapping[str, Any], precision: str, report: Mapping[str, Any]) -> dict[str, Array]:
    """Pictures by seed, float32 [N, H, W, 3] in 0..1, drawn with the request of the report."""
    found = {}
    with tempfile.TemporaryDirectory() as folder, MeasuredProcess(f"{row['backend']} {precision}") as process:
        for seed in SEEDS:
            request = {**report["request"], "seed": seed}
            process.ask("load", bundle=str(bundle.path), backend=row["backend"], precision=precision, request=request)
            path = Path(folder) / f"{seed}.npy"
            process.ask("save_picture", path=str(path))
            found[str(seed)] = np.load(path)
    return found


def with_record(manifest: Manifest, precision: str, entry: dict[str, Any]) -> Manifest:
    """The manifest with a record at the denoiser's graph; an older record of the same thing is dropped."""
    component = manifest.components[DENOISER]
    graph = graph_precision(precision)
    variant = component.variants[graph]
    others = [old for old in variant.measured if any(old.get(name) != entry.get(name) for name in IDENTITY)]
    variant = dataclasses.replace(variant, measured=(*others, entry))
    component = dataclasses.replace(component, variants={**component.variants, graph: variant})
    return dataclasses.replace(manifest, components={**manifest.components, DENOISER: component})

"""What calibration keeps in the bundle: plan, statistics, probes and bias corrections, so that a plan can be reapplied."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import numpy as np

from latentedge.calibration.capture import DECODER
from latentedge.calibration.plan import Plan, write_atomically
from latentedge.calibration.quantise import Evidence
from latentedge.calibration.records import Probe, pack, unpack
from latentedge.runtime.bundle import Array
from latentedge.runtime.errors import UsageError

FOLDER = "calibration"


def relative_folder(component: str) -> str:
    """Where a component's plan and statistics are: the denoiser's in ``calibration/``, a decoder's below it."""
    return f"{FOLDER}/{DECODER}" if component == DECODER else FOLDER


def store(folder: Path, plan: Plan, evidence: Evidence, probes: list[Probe]) -> None:
    """Write plan, statistics, probes and bias corrections."""
    plan.save(folder / "plan.json")
    write_atomically(folder / "statistics.npz", pack(dict(evidence.statistics), probes))
    write_atomically(folder / "bias.npz", _packed(evidence))


def restore(folder: Path) -> tuple[Evidence, list[Probe]]:
    """What :func:`store` wrote, without the plan."""
    if not (folder / "statistics.npz").is_file():
        raise UsageError(
            f"{folder} holds no statistics that a plan could be applied with.",
            hint="run `latentedge calibrate BUNDLE` first",
        )
    statistics, probes = unpack(folder / "statistics.npz")
    with np.load(folder / "bias.npz", allow_pickle=False) as file:
        bias: dict[str, Array] = {name: file[name] for name in file.files}
    return Evidence(statistics, bias), probes


def digest_of(plan: Plan, evidence: Evidence, probes: list[Probe], *others: object) -> str:
    """SHA-256 over everything that a block's error follows from."""
    digest = hashlib.sha256(plan.to_text().encode())
    digest.update(pack(dict(evidence.statistics), probes))
    digest.update(_packed(evidence))
    digest.update(repr(others).encode())
    return digest.hexdigest()


def _packed(evidence: Evidence) -> bytes:
    stream = io.BytesIO()
    np.savez_compressed(stream, **dict(evidence.bias))  # type: ignore[arg-type]
    return stream.getvalue()

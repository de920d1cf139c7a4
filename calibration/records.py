"""Statistics and probes as arrays in one file, without pickling, so that a checkpoint is small and safe to read."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from latentedge.calibration.observers import BINS, TensorStatistics
from latentedge.runtime.bundle import Array
from latentedge.runtime.errors import LatentEdgeError


@dataclass(frozen=True)
class Probe:
    """One evaluation of the denoiser on the fp32 trajectory: what went in, and what came out.

    ``inputs`` by name, with conditional and unconditional branches along the batch; ``output`` float32 of ``sample``'s
    batch; ``step`` is its index in the trajectory, ``sample`` the index of the calibration sample.
    """

    sample: int
    step: int
    inputs: dict[str, Array]
    output: Array

    @property
    def timestep(self) -> float:
        """The model's timestep; 0 for a network that takes none."""
        return float(self.inputs["timestep"][0]) if "timestep" in self.inputs else 0.0


def pack(statistics: Mapping[str, TensorStatistics], probes: list[Probe], latents: Array | None = None) -> bytes:
    """Statistics, probes and the latents that a trajectory ended in, as the bytes of an npz file."""
    arrays: dict[str, Array] = {"names": np.array(list(statistics), dtype=np.str_)}
    for index, entry in enumerate(statistics.values()):
        present = np.flatnonzero(entry.counts)
        arrays[f"{index}.bins"] = present.astype(np.uint16)
        arrays[f"{index}.counts"] = entry.counts[present]
        arrays[f"{index}.channel_amax"] = entry.channel_amax
        arrays[f"{index}.channel_squares"] = entry.channel_squares
        arrays[f"{index}.values"] = np.array(entry.values, np.int64)
        for name, table in (("amax", entry.amax), ("not_finite", entry.not_finite)):
            arrays[f"{index}.{name}"] = np.array(sorted(table.items()), np.float64).reshape(-1, 2)
    for number, probe in enumerate(probes):
        arrays[f"probe{number}.place"] = np.array([probe.sample, probe.step], np.int64)
        arrays[f"probe{number}.output"] = probe.output
        for name, array in probe.inputs.items():
            arrays[f"probe{number}.input.{name}"] = array
    if latents is not None:
        arrays["latents"] = latents
    stream = io.BytesIO()
    np.savez_compressed(stream, **arrays)  # type: ignore[arg-type]
    return stream.getvalue()


def unpack(data: bytes | Path) -> tuple[dict[str, TensorStatistics], list[Probe]]:
    """The statistics and probes that :func:`pack` wrote; :class:`LatentEdgeError` where the file is damaged."""
    try:
        with np.load(io.BytesIO(data) if isinstance(data, bytes) else data, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        statistics = {str(name): _statistics(arrays, index) for index, name in enumerate(arrays["names"])}
    except (KeyError, ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        origin = "" if isinstance(data, bytes) else f" {data}"
        raise LatentEdgeError(f"the calibration record{origin} is damaged: {error}.", hint="calibrate again") from error
    probes: list[Probe] = []
    while f"probe{len(probes)}.place" in arrays:
        prefix = f"probe{len(probes)}."
        sample, step = (int(value) for value in arrays[f"{prefix}place"])
        marker = f"{prefix}input."
        inputs = {name[len(marker) :]: array for name, array in arrays.items() if name.startswith(marker)}
        probes.append(Probe(sample, step, inputs, arrays[f"{prefix}output"]))
    return statistics, probes


def final_latents(file: Path) -> Array:
    """The latents ``[1, C, h, w]`` of a sample's checkpoint, in the model's own scale."""
    with np.load(file, allow_pickle=False) as arrays:
        return np.asarray(arrays["latents"])


def _statistics(arrays: Mapping[str, Array], index: int) -> TensorStatistics:
    counts = np.zeros(BINS, np.int64)
    counts[arrays[f"{index}.bins"]] = arrays[f"{index}.counts"]
    return TensorStatistics(
        counts,
        arrays[f"{index}.channel_amax"],
        arrays[f"{index}.channel_squares"],
        int(arrays[f"{index}.values"]),
        {float(step): float(value) for step, value in arrays[f"{index}.amax"]},
        {float(step): int(value) for step, value in arrays[f"{index}.not_finite"]},
    )

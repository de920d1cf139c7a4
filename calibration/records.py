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

#: Tables of an activation's statistics by timestep.
TABLES = ("amax", "not_finite")
_NONE = np.zeros(0, np.int64)


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
    """Statistics, probes and the latents that a trajectory ended in, as the bytes of an npz file.

    Few arrays hold the statistics of all tensors, one behind the other: each array in a file costs time of its own.
    """
    arrays: dict[str, Array] = {
        "names": np.array(list(statistics), dtype=np.str_),
        **_joined(list(statistics.values())),
    }
    for number, probe in enumerate(probes):
        arrays[f"probe{number}.place"] = np.array([probe.sample, probe.step], np.int64)
        arrays[f"probe{number}.output"] = probe.output
        for name, array in probe.inputs.items():
            arrays[f"probe{number}.input.{name}"] = array
    if latents is not None:
        arrays["latents"] = latents
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file:
        for name, array in arrays.items():
            with file.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.asanyarray(array), allow_pickle=False)
    return stream.getvalue()


def _joined(entries: list[TensorStatistics]) -> dict[str, Array]:
    """The statistics of several tensors: ``present`` bins and ``channels`` of each, and its tables' rows by its index."""
    bins = [np.flatnonzero(entry.counts) for entry in entries]
    counts = np.concatenate([entry.counts[present] for entry, present in zip(entries, bins, strict=True)] or [_NONE])
    arrays: dict[str, Array] = {
        "present": np.array([len(present) for present in bins], np.int64),
        "channels": np.array([entry.channel_amax.size for entry in entries], np.int64),
        "bins": np.concatenate(bins or [_NONE]).astype(np.uint16),
        "counts": counts.astype(np.min_scalar_type(int(counts.max(initial=0)))),
        "channel_amax": np.concatenate([entry.channel_amax for entry in entries] or [_NONE]).astype(np.float32),
        "channel_squares": np.concatenate([entry.channel_squares for entry in entries] or [_NONE]),
        "values": np.array([entry.values for entry in entries], np.int64),
    }
    for name in TABLES:
        rows = [(index, *row) for index, entry in enumerate(entries) for row in sorted(getattr(entry, name).items())]
        arrays[name] = np.array(rows, np.float64).reshape(-1, 3)
    return arrays


def unpack(data: bytes | Path) -> tuple[dict[str, TensorStatistics], list[Probe]]:
    """The statistics and probes that :func:`pack` wrote; :class:`LatentEdgeError` where the file is damaged."""
    try:
        with np.load(io.BytesIO(data) if isinstance(data, bytes) else data, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        names = [str(name) for name in arrays["names"]]
        statistics = dict(zip(names, _separate(arrays), strict=True))
    except (KeyError, IndexError, ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
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


def _separate(arrays: Mapping[str, Array]) -> list[TensorStatistics]:
    """What :func:`_joined` joined."""
    entries = []
    present, channels = (np.concatenate([[0], np.cumsum(arrays[name])]) for name in ("present", "channels"))
    for index, values in enumerate(arrays["values"]):
        bins, width = slice(*present[index : index + 2]), slice(*channels[index : index + 2])
        counts = np.zeros(BINS, np.int64)
        counts[arrays["bins"][bins]] = arrays["counts"][bins]
        entries.append(
            TensorStatistics(counts, arrays["channel_amax"][width], arrays["channel_squares"][width], int(values))
        )
    for index, step, value in arrays["amax"]:
        entries[int(index)].amax[float(step)] = float(value)
    for index, step, value in arrays["not_finite"]:
        entries[int(index)].not_finite[float(step)] = int(value)
    return entries

"""What less memory costs in time, and what computing less in some steps costs in quality, measured.

``latentedge bench --memory`` and ``latentedge bench --step-caching``; with ``--record`` the manifest keeps the result,
for ``generate`` to choose from.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from latentedge.benchmarks.processes import MeasuredProcess
from latentedge.benchmarks.records import SEEDS, psnr_db, with_record
from latentedge.benchmarks.statistics import Times, compare_rounds
from latentedge.export.bundle_writer import write_manifest
from latentedge.runtime.bundle import Array, Bundle, Manifest
from latentedge.runtime.engines.hoisted import DENOISER, SHALLOW, part_name
from latentedge.runtime.errors import EngineError, LatentEdgeError, UsageError
from latentedge.runtime.machine import machine_fingerprint
from latentedge.runtime.selection import library_version
from latentedge.runtime.tradeoffs import GUIDED, describe_reuse

#: Intervals that step caching and guidance are measured with.
INTERVALS = (2, 3, 5, 7)

#: Full steps that lie closer at the beginning (above 1) or at the end (below 1): the k-th of n of them is at the share
#: ``(k / n) ** power`` of the steps (DeepCache, arXiv 2312.00858, spaces its full steps unevenly as well).
POWERS = (0.6, 1.6)

#: Shares of the steps, counted from the last, that are computed without guidance (arXiv 2404.07724).
UNGUIDED = (0.25, 0.5)

#: As POWERS, of the steps that compute guidance anew.
GUIDED_POWERS = (0.8,)

#: An end of guidance's interval that lies above every sigma.
HIGHEST_SIGMA = 1e9

Setting = tuple[str, str]
Notify = Callable[[str], None]


def ladder(manifest: Manifest, size: tuple[int, int]) -> list[tuple[bool, int | None]]:
    """Combinations of (low memory, tile) from what needs most to what needs least, for pictures of ``size``."""
    steps: list[tuple[bool, int | None]] = [(False, None), (True, None)]
    decoder = manifest.components.get("vae_decoder")
    axis = None if decoder is None else decoder.axes.get("latent_height")
    longest = max(size) // manifest.latent.downscale
    for parts in (2, 4):
        if axis is not None:
            tile = longest // parts // axis.multiple * axis.multiple
            if tile >= max(axis.min, 8):
                steps.append((True, tile))
    return steps


def measure_memory(
    bundle: Bundle, settings: Sequence[Setting], request: Mapping[str, Any], options: Mapping[str, Any], notify: Notify
) -> list[dict[str, Any]]:
    """Peak of memory, and seconds from opening the bundle to the first picture, of each setting and combination.

    Each in a process of its own. A setting that this machine does not offer is reported to ``notify`` and left out;
    :class:`EngineError` when none is left.
    """
    size = _size(bundle, request)
    rows = []
    for backend, precision in settings:
        for low_memory, tile in ladder(bundle.manifest, size):
            row = {"backend": backend, "precision": precision, "low_memory": low_memory, "tile": tile,
                   "height": size[0], "width": size[1]}  # fmt: skip
            asked = {**request, **({} if tile is None else {"tile": tile})}
            with MeasuredProcess(f"{backend} {precision}") as process:
                try:
                    loaded = _load(process, bundle, backend, precision, asked, {**options, "low_memory": low_memory})
                except EngineError as error:
                    notify(f"{backend} {precision} was not measured: {error.message}")
                    break
                peak = process.ask("memory")["peak_rss"]
            rows.append({**row, "peak_bytes": peak, "seconds": loaded["first_picture_seconds"]})
            notify(describe_memory(rows[-1]))
    if not rows:
        raise EngineError("no setting could be measured.", hint="`latentedge doctor` shows what this machine offers")
    return rows


def measure_step_caching(
    bundle: Bundle,
    settings: Sequence[Setting],
    request: Mapping[str, Any],
    options: Mapping[str, Any],
    rounds: int,
    notify: Notify,
) -> list[dict[str, Any]]:
    """Speed and quality of each way to compute less in some steps, against the same setting with every step in full.

    Speed is that of whole pictures in turns; quality the PSNR of pictures of the same noise, mean and worst.
    :class:`UsageError` where the bundle has no graphs for it.
    """
    if part_name(DENOISER, SHALLOW) not in bundle.manifest.components:
        raise UsageError(
            f"{bundle.path} has no graphs for step caching.",
            hint=f"latentedge build {bundle.path} --backend {settings[0][0]} --plan step-caching",
        )
    steps = int(request.get("steps", bundle.manifest.defaults.steps))
    rows = []
    for backend, precision in settings:
        with ExitStack() as stack, tempfile.TemporaryDirectory() as folder:
            plain = stack.enter_context(MeasuredProcess(f"{backend} {precision}"))
            try:
                _load(plain, bundle, backend, precision, request, options)
            except LatentEdgeError as error:
                notify(f"{backend} {precision} was not measured: {error.message}")
                continue
            reference = _pictures(plain, Path(folder))
            for way in (*ways(steps), *guided(steps, _sigmas_of_guidance(plain, bundle))):
                asked, engine = _as_asked(way, request, options)
                with MeasuredProcess(f"{backend} {precision}, {describe_reuse({**way, 'steps': steps})}") as cached:
                    _load(cached, bundle, backend, precision, asked, engine)
                    values = [psnr_db(*pair) for pair in zip(reference, _pictures(cached, Path(folder)), strict=True)]
                    seconds = _in_turns(plain, cached, rounds)
                ratio = compare_rounds(*seconds)
                rows.append(
                    {"backend": backend, "precision": precision, **way, "steps": steps, "ratio": ratio.ratio,
                     "ratio_low": ratio.low, "ratio_high": ratio.high, "seconds": Times.of(seconds[1]).p50,
                     "psnr_db": float(np.mean(values)), "psnr_worst_db": float(np.min(values)),
                     "pictures": len(values), "rounds": rounds}
                )  # fmt: skip
                notify(describe_step_caching(rows[-1]))
    return rows


def ways(steps: int) -> list[dict[str, Any]]:
    """Ways to leave the deep blocks out of some of ``steps`` evaluations: intervals, and uneven lists of full steps."""
    found: list[dict[str, Any]] = [{"interval": interval} for interval in INTERVALS if interval <= steps]
    return found + [{"full": full} for full in _uneven(steps, INTERVALS, POWERS)]


def guided(steps: int, sigmas: Sequence[float]) -> list[dict[str, Any]]:
    """Ways to compute guidance in some of ``steps`` evaluations, whose ``sigmas`` are given; none without sigmas.

    Either its last difference is kept between them, or it is off in the last steps.
    """
    if not sigmas:
        return []
    found: list[dict[str, Any]] = [{"guidance_every": every} for every in INTERVALS if every < steps]
    found += [{"guidance_every": listed} for listed in _uneven(steps, INTERVALS, GUIDED_POWERS)]
    lows = [sigmas[-1 - int(share * len(sigmas))] for share in UNGUIDED if int(share * len(sigmas))]
    return found + [{"guidance_interval": [low, HIGHEST_SIGMA]} for low in dict.fromkeys(lows)]


def _uneven(steps: int, intervals: Sequence[int], powers: Sequence[float]) -> list[list[int]]:
    """As many of ``steps`` as each interval takes, spaced by each power; without what an interval is itself."""
    seen = {tuple(range(0, steps, interval)) for interval in (1, *intervals)}
    found = []
    for interval in intervals:
        count = len(range(0, steps, interval))
        for power in powers:
            listed = tuple(sorted({round(steps * (index / count) ** power) for index in range(count)}))
            if len(listed) == count and count > 1 and listed[-1] < steps and listed not in seen:
                seen.add(listed)
                found.append(list(listed))
    return found


def _sigmas_of_guidance(process: MeasuredProcess, bundle: Bundle) -> list[float]:
    """The sigmas of a picture's evaluations; none for a model without guidance."""
    sigmas: list[float] = process.ask("sigmas")["sigmas"]
    distilled = bundle.manifest.conditioning.guidance_embedding is not None
    return [] if distilled or bundle.manifest.defaults.guidance_scale in (None, 0, 1) else sigmas


def _as_asked(
    way: Mapping[str, Any], request: Mapping[str, Any], options: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arguments of ``generate`` and the engine options that a way to compute less means."""
    engine = {"cache_interval": way.get("interval", 1), "cache_full": way.get("full", [])}
    guidance = {name: value for name, value in way.items() if name in GUIDED}
    return {**request, **guidance}, {**options, **engine}


def keep(bundle: Bundle, kind: str, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows into the bundle's manifest as records of ``kind`` on this machine; none of a backend with settings."""
    manifest = Bundle.open(bundle.path).manifest
    for row in (row for row in rows if ":" not in row["backend"]):
        where = {"machine": machine_fingerprint(), "library": library_version(row["backend"])}
        manifest = with_record(manifest, row["precision"], {"kind": kind, **row, **where})
    write_manifest(bundle.path, manifest)


def describe_memory(row: Mapping[str, Any]) -> str:
    """One line about a combination."""
    how = "low memory" if row["low_memory"] else "all networks at once"
    tile = "" if row["tile"] is None else f", tiles of {row['tile']}"
    peak = f"{row['peak_bytes'] / 2**20:.0f} MiB"
    return f"{row['backend']} {row['precision']}, {how}{tile}: {peak}, {row['seconds']:.2f} s to the first picture"


def describe_step_caching(row: Mapping[str, Any]) -> str:
    """One line about a way to compute less."""
    return (
        f"{row['backend']} {row['precision']}, {describe_reuse(row)}: {row['ratio']:.2f} times as fast "
        f"({row['ratio_low']:.2f}-{row['ratio_high']:.2f}), {row['psnr_worst_db']:.1f} dB PSNR at worst"
    )


def _size(bundle: Bundle, request: Mapping[str, Any]) -> tuple[int, int]:
    defaults = bundle.manifest.defaults
    return int(request.get("height", defaults.height)), int(request.get("width", defaults.width))


def _load(
    process: MeasuredProcess, bundle: Bundle, backend: str, precision: str, request: Mapping[str, Any],
    options: Mapping[str, Any],
) -> dict[str, Any]:  # fmt: skip
    return process.ask(
        "load",
        bundle=str(bundle.path),
        backend=backend,
        precision=precision,
        request=dict(request),
        options=dict(options),
    )


def _pictures(process: MeasuredProcess, folder: Path) -> list[Array]:
    """A picture of each seed, float32 [N, H, W, 3] in 0..1."""
    path = folder / "picture.npy"
    return [np.load(process.ask("save_picture", path=str(path), seed=seed)["path"]) for seed in SEEDS]


def _in_turns(plain: MeasuredProcess, cached: MeasuredProcess, rounds: int) -> tuple[list[float], list[float]]:
    """Seconds of a picture of each, by round; the order turns."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for index in range(rounds):
        pair = [(seconds[0], plain), (seconds[1], cached)]
        for times, process in pair if index % 2 == 0 else reversed(pair):
            times.append(process.ask("picture")["seconds"])
    return seconds

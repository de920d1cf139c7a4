"""What ``generate`` gives up for memory or for speed, chosen from what ``latentedge bench --record`` measured here.

The manifest's records (``docs/bundle.md``): ``memory`` holds the peak of a process that drew one picture with one
combination of settings, ``step-caching`` the speed and quality of one way to compute less in some steps.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from latentedge.runtime import engines
from latentedge.runtime.bundle import Bundle, Manifest, graph_precision
from latentedge.runtime.engines.base import EngineOptions
from latentedge.runtime.errors import EngineError, UsageError
from latentedge.runtime.machine import machine_fingerprint
from latentedge.runtime.selection import DENOISER, PRECISIONS, choose, good_enough, library_version

#: How much more than a record the command itself may hold: measured were 261 MiB where the record was 257.
MARGIN = 1.03

#: A request's arguments that leave out evaluations of guidance.
GUIDED = ("guidance_interval", "guidance_every")

_UNITS = {"": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


@dataclass(frozen=True)
class Combination:
    """Settings that were measured to fit, and what they cost."""

    backend: str
    precision: str
    low_memory: bool
    #: Side of a decoder's tile in latent pixels.
    tile: int | None
    reason: str


@dataclass(frozen=True)
class Wishes:
    """What the caller asks for: at most so many bytes, and the worst PSNR in dB that computing less in some steps may cost."""

    memory_limit: int | None = None
    auto_quality: float | None = None


def settle(
    path: Path,
    setting: tuple[str, str],
    options: EngineOptions,
    wishes: Wishes,
    requests: Sequence[dict[str, Any]],
    notify: Callable[[str], None],
) -> tuple[tuple[str, str], EngineOptions]:
    """Backend and precision, and engine options, that grant ``wishes``; tiles are written into ``requests``.

    ``notify`` is told what was chosen and what it costs. :class:`UsageError` where the caller chose the same by hand.
    """
    if wishes.memory_limit is None and wishes.auto_quality is None:
        return setting, options
    if ":" in setting[0]:
        raise UsageError(f"--memory-limit and --auto-quality know no settings of a backend, found {setting[0]!r}.")
    bundle = Bundle.open(path)
    if wishes.memory_limit is not None:
        if options.low_memory or any("tile" in request for request in requests):
            raise UsageError("--memory-limit chooses low memory and tiles itself; leave --low-memory and --tile out.")
        sizes = [picture_size(bundle.manifest, request) for request in requests]
        found = fitting(bundle, *setting, wishes.memory_limit, (max(h for h, _ in sizes), max(w for _, w in sizes)))
        notify(found.reason)
        setting = found.backend, found.precision
        options = dataclasses.replace(options, low_memory=found.low_memory)
        for request in requests:
            request.update({} if found.tile is None else {"tile": found.tile})
    if wishes.auto_quality is not None:
        if options.caching or any(name in request for name in GUIDED for request in requests):
            raise UsageError(
                "--auto-quality chooses step caching and the evaluations of guidance itself; leave --cache-interval and "
                "guidance's interval and every out."
            )
        chosen = choose(bundle, *setting)
        setting = chosen.backend, chosen.precision
        found_reuse, reason = reuse(bundle, *setting, wishes.auto_quality, requests)
        notify(f"auto-quality: {reason}")
        options = dataclasses.replace(
            options, cache_interval=found_reuse.get("interval") or 1, cache_full=tuple(found_reuse.get("full") or ())
        )
        for request in requests:
            request.update({name: found_reuse[name] for name in GUIDED if found_reuse.get(name) is not None})
    return setting, options


def picture_size(manifest: Manifest, request: Mapping[str, Any]) -> tuple[int, int]:
    """Height and width of what a request draws: asked for, the given picture's, or the bundle's default."""
    defaults, scale = manifest.defaults, manifest.conditioning.upscale or 1
    size = defaults.height, defaults.width
    if isinstance(request.get("image"), str):
        with Image.open(request["image"]) as image:
            size = image.height * scale, image.width * scale
    return int(request.get("height") or size[0]), int(request.get("width") or size[1])


def peak_memory() -> int | None:
    """The highest resident memory of this process so far, in bytes; ``None`` where the system does not tell."""
    status = Path("/proc/self/status")
    lines = status.read_text(encoding="utf-8").splitlines() if status.is_file() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)


def parse_bytes(text: str | None) -> int | None:
    """``"1GiB"``, ``"512MiB"`` or a number of bytes; :class:`UsageError` for anything else."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(KiB|MiB|GiB)?", text)
    if match is None or not float(match[1]):
        raise UsageError(f"expected a size such as 1GiB or 512MiB, found {text!r}.")
    return int(float(match[1]) * _UNITS[match[2] or ""])


def fitting(bundle: Bundle, backend: str, precision: str, limit: int, size: tuple[int, int]) -> Combination:
    """The fastest combination that fits ``limit`` bytes for a picture of ``size`` (height, width) or the next larger.

    "auto" takes every backend, and every precision above its quality floor. :class:`UsageError` where nothing was
    measured on this machine; :class:`EngineError` where nothing fits, with the least that was measured.
    """
    command = f"latentedge bench {bundle.path} --size {size[1]}x{size[0]} --memory --record"
    found = [
        record
        for record in _records(bundle, "memory", backend, precision)
        if record["height"] >= size[0] and record["width"] >= size[1]
    ]
    if not found:
        raise UsageError(
            f"no peak of memory was measured on this machine for {size[1]}x{size[0]} with backend {backend} and "
            f"precision {precision}.",
            hint=f"measure it: {command}",
        )
    # A larger picture's record is an upper bound; the nearest size says most.
    nearest = min(record["height"] * record["width"] for record in found)
    found = [record for record in found if record["height"] * record["width"] == nearest]
    fits = [record for record in found if record["peak_bytes"] * MARGIN <= limit]
    if not fits:
        least = min(found, key=lambda record: record["peak_bytes"])
        raise EngineError(
            f"nothing that was measured here draws {size[1]}x{size[0]} in {in_words(limit)}: the least is "
            f"{in_words(least['peak_bytes'])} and {MARGIN - 1:.0%} for the command itself, {describe(least)}.",
            hint="raise --memory-limit, or draw a smaller picture",
        )
    best, fastest = (min(rows, key=lambda record: float(record["seconds"])) for rows in (fits, found))
    reason = f"{describe(best)}: {in_words(best['peak_bytes'])} and {best['seconds']:.2f} s a picture"
    if best is not fastest:
        reason += (
            f"; without a limit {describe(fastest)}: {in_words(fastest['peak_bytes'])} and {fastest['seconds']:.2f} s"
        )
    return Combination(best["backend"], best["precision"], best["low_memory"], best["tile"], f"measured here: {reason}")


def reuse(
    bundle: Bundle, backend: str, precision: str, floor_db: float, requests: Sequence[Mapping[str, Any]]
) -> tuple[dict[str, Any], str]:
    """The fastest measured way to compute less in some steps whose worst picture is at ``floor_db`` or better, and why.

    A record of step caching, with ``interval`` or ``full``, or of guidance, with one of :data:`GUIDED`; an empty one
    where none is faster and good enough. :class:`UsageError` where none was measured here for what ``requests`` ask for.
    """
    steps = {int(request.get("steps") or bundle.manifest.defaults.steps) for request in requests}
    samplers = {request.get("sampler") for request in requests}
    scales = {request.get("guidance_scale") for request in requests}
    found = [
        record
        for record in _records(bundle, "step-caching", backend, precision)
        if _holds_for(record, steps)
        and samplers == {record.get("sampler")}
        and scales <= {record.get("guidance_scale")}
    ]
    if not found:
        asked = "" if samplers == {None} and scales == {None} else " and this sampler and guidance"
        raise UsageError(
            f"step caching was not measured on this machine with {backend} in {precision} for "
            f"{' and '.join(str(number) for number in sorted(steps))} steps{asked}.",
            hint=f"latentedge build {bundle.path} --backend {backend} --plan step-caching, and then latentedge bench "
            f"{bundle.path} --backend {backend} --precision {precision} --steps {min(steps)} --step-caching --record",
        )
    good = [record for record in found if record["psnr_worst_db"] >= floor_db and record["ratio_low"] > 1]
    if not good:
        best = max(found, key=lambda record: float(record["psnr_worst_db"]))
        return {}, (
            f"nothing is faster and at {floor_db:g} dB or better; the best of {len(found)} measured is "
            f"{describe_reuse(best)} with {best['psnr_worst_db']:.1f} dB"
        )
    chosen = max(good, key=lambda record: float(record["ratio"]))
    return chosen, (
        f"{describe_reuse(chosen)}, measured here: {chosen['ratio']:.2f} times as fast, "
        f"{chosen['psnr_worst_db']:.1f} dB PSNR at worst against every step in full"
    )


def _holds_for(record: Mapping[str, Any], steps: set[int]) -> bool:
    """Whether a record tells of pictures of ``steps``: of the same number, or of fewer, which lie further apart.

    A list of full steps is one for its own number of steps.
    """
    measured = record.get("steps", 0)
    listed = record.get("full") or isinstance(record.get("guidance_every"), list)
    return measured > 0 and (steps == {measured} if listed else min(steps) >= measured)


def describe_reuse(record: Mapping[str, Any]) -> str:
    """In words, what a record of step caching or of guidance leaves out."""
    if record.get("full"):
        return f"steps {', '.join(str(index) for index in record['full'])} of {record['steps']} in full"
    if every := record.get("guidance_every"):
        listed = f"steps {', '.join(map(str, every))}" if isinstance(every, list) else f"one step of {every}"
        return f"guidance anew in {listed}"
    if record.get("guidance_interval"):
        return f"guidance at sigmas from {record['guidance_interval'][0]:.3g} on"
    return f"one step of {record['interval']} in full"


def describe(record: dict[str, Any]) -> str:
    """A memory record's settings in words."""
    parts = [f"{record['backend']} {record['precision']}"]
    if record["low_memory"]:
        parts.append("one network at a time and one branch of guidance at a time")
    if record["tile"] is not None:
        parts.append(f"decoded in tiles of {record['tile']} latent pixels")
    return ", ".join(parts)


def _records(bundle: Bundle, kind: str, backend: str, precision: str) -> list[dict[str, Any]]:
    """Records of this machine and of the libraries that are installed here, for settings that may be chosen."""
    component = bundle.component(DENOISER)
    machine = machine_fingerprint()
    if backend != "auto":
        engines.backend(backend)
    names = [name for name, entry in engines.BACKENDS.items() if entry.installed()] if backend == "auto" else [backend]
    return [
        record
        for name in names
        for wanted in (PRECISIONS[name] if precision == "auto" else (precision,))
        if graph_precision(wanted) in component.variants
        and (precision != "auto" or good_enough(component, name, wanted))
        for record in component.variants[graph_precision(wanted)].measured
        if (record.get("kind"), record.get("backend"), record.get("precision")) == (kind, name, wanted)
        and (record.get("machine"), record.get("library")) == (machine, library_version(name))
    ]


def in_words(count: float) -> str:
    """Bytes as GiB or MiB."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"

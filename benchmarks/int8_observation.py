"""What calibration's observation costs: pictures drawn with the observed denoiser, beside the same drawn plainly.

    python -m latentedge.benchmarks.int8_observation BUNDLE

Both run the fp32 graph on ONNX Runtime, in turns; each of calibration's samples is one round. What is kept of a sample
is a file, and the sums over samples are of one size, so memory does not grow with them: the peaks show it.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import click

from latentedge.benchmarks.statistics import Ratio, compare_rounds
from latentedge.calibration.capture import CaptureSettings, take_sample
from latentedge.calibration.observers import TensorStatistics, merge_all
from latentedge.calibration.records import unpack
from latentedge.calibration.requests import requests
from latentedge.runtime.bundle import Bundle
from latentedge.runtime.engines import EngineOptions
from latentedge.runtime.pipeline import Pipeline
from latentedge.runtime.tradeoffs import peak_memory


@dataclass(frozen=True)
class Cost:
    """``slowdown``: seconds of observed samples over plain ones, by the clock and of the processor.

    ``peaks``: the process's peak of memory in bytes after each sample. ``tensors``: how many activations are observed,
    ``statistics_bytes``: what their statistics hold, whatever the number of samples.
    """

    slowdown: Ratio
    processor_slowdown: Ratio
    plain_seconds: tuple[float, ...]
    observed_seconds: tuple[float, ...]
    peaks: tuple[int | None, ...]
    tensors: int
    statistics_bytes: int


def measure(settings: CaptureSettings) -> Cost:
    """Draw ``settings.samples`` calibration pictures twice each, plainly and observed; the order turns."""
    bundle = Bundle.open(settings.bundle)
    wanted = requests(bundle, settings.samples, settings.steps, settings.prompts)
    statistics: dict[str, TensorStatistics] = {}
    clock: tuple[list[float], list[float]] = ([], [])
    processor: tuple[list[float], list[float]] = ([], [])
    peaks: list[int | None] = []
    with Pipeline(bundle, "onnxruntime", "fp32", EngineOptions(threads=settings.threads)) as plain:

        def drawn(index: int) -> None:
            request = dict(wanted[index])
            for _ in plain.steps(request.pop("prompt", None), **request):
                pass

        # Opening the engines belongs to neither.
        drawn(0)
        take_sample(settings, 0)
        for index in range(settings.samples):
            turns: list[tuple[int, Callable[[], object]]]
            turns = [(0, partial(drawn, index)), (1, partial(take_sample, settings, index))]
            for which, work in turns if index % 2 == 0 else turns[::-1]:
                seconds, processor_seconds, found = _timed(work)
                clock[which].append(seconds)
                processor[which].append(processor_seconds)
                if isinstance(found, bytes):
                    statistics = merge_all([statistics, unpack(found)[0]])
            peaks.append(peak_memory())
    return Cost(
        compare_rounds(clock[1], clock[0]),
        compare_rounds(processor[1], processor[0]),
        tuple(clock[0]),
        tuple(clock[1]),
        tuple(peaks),
        len(statistics),
        sum(_bytes(entry) for entry in statistics.values()),
    )


def _timed(work: Callable[[], object]) -> tuple[float, float, object]:
    """Seconds by the clock and of the processor, and what the work gives."""
    gc.collect()
    before = time.perf_counter(), time.process_time()
    found = work()
    return time.perf_counter() - before[0], time.process_time() - before[1], found


def _bytes(entry: TensorStatistics) -> int:
    return int(entry.counts.nbytes + entry.channel_amax.nbytes + entry.channel_squares.nbytes)


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--samples", default=8, show_default=True, help="Calibration pictures, each drawn twice.")
@click.option("--steps", type=int, help="Steps of each.  [default: the bundle's]")
@click.option("--threads", type=click.IntRange(min=1), help="Threads of each.  [default: physical cores]")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="JSON file.")
def main(path: Path, samples: int, steps: int | None, threads: int | None, output: Path | None) -> None:
    """Measure what observing BUNDLE's denoiser costs."""
    cost = measure(CaptureSettings(str(path), samples=samples, steps=steps, threads=threads))
    for name, ratio in (("by the clock", cost.slowdown), ("processor seconds", cost.processor_slowdown)):
        click.echo(f"{name}: {ratio.ratio:.2f} times as long ({ratio.low:.2f}-{ratio.high:.2f})")
    first, last = (f"{peak / 2**20:.0f} MiB" if peak else "not reported" for peak in (cost.peaks[0], cost.peaks[-1]))
    click.echo(
        f"peak after the first sample {first}, after {samples} {last}; statistics of {cost.tensors} activations: "
        f"{cost.statistics_bytes / 2**20:.1f} MiB"
    )
    if output is not None:
        output.write_text(json.dumps(dataclasses.asdict(cost), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

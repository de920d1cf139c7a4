"""Start-up and memory beside diffusers: ``latentedge --help``, and the first picture from process start to PNG, also with
``--low-memory``.

``python -m latentedge.benchmarks.startup BUNDLE DIFFUSERS_FOLDER`` starts each program several times, in turns, and
prints seconds and peak memory. The diffusers equivalents import the library and print its pipelines' help, and draw the
same picture from a diffusers folder.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import click

from latentedge.benchmarks.statistics import Times, compare_rounds
from latentedge.benchmarks.worker import PROMPT
from latentedge.runtime.errors import EngineError

HELP = "import diffusers; help(diffusers.StableDiffusionPipeline.__init__)"
PICTURE = """
import sys, torch
from diffusers import StableDiffusionPipeline
folder, prompt, steps, side, output = sys.argv[1:]
pipe = StableDiffusionPipeline.from_pretrained(folder)
pipe.set_progress_bar_config(disable=True)
generator = torch.Generator().manual_seed(0)
pipe(prompt, num_inference_steps=int(steps), height=int(side), width=int(side), generator=generator).images[0].save(output)
"""


#: Starts a program and reports on it. A process's peak memory counts what it was before the program took its place, so
#: the launcher is a bare interpreter.
LAUNCHER = """
import os, sys, time
begin = time.perf_counter()
child = os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ)
_, status, usage = os.wait4(child, 0)
seconds = time.perf_counter() - begin
os.write(3, f"{os.waitstatus_to_exitcode(status)} {seconds} {usage.ru_utime + usage.ru_stime} {usage.ru_maxrss}".encode())
"""


def start(command: list[str]) -> dict[str, float]:
    """Run a program to its end: seconds, processor seconds, and peak memory in bytes.

    :class:`EngineError` with its last words when it fails.
    """
    with tempfile.TemporaryFile() as errors, tempfile.TemporaryFile() as answer:
        launcher = [sys.executable, "-I", "-S", "-c", LAUNCHER.replace("write(3", f"write({answer.fileno()}"), *command]
        subprocess.run(launcher, stdout=subprocess.DEVNULL, stderr=errors, pass_fds=[answer.fileno()], check=True)
        answer.seek(0)
        code, seconds, processor, kilobytes = answer.read().split()
        if int(code) != 0:
            errors.seek(0)
            raise EngineError(f"{' '.join(command[:3])} failed: {errors.read().decode(errors='replace')[-500:]}")
    return {"seconds": float(seconds), "processor_seconds": float(processor), "peak_rss": int(kilobytes) * 1024.0}


def measure(pairs: dict[str, tuple[list[str], list[str]]], rounds: int) -> dict[str, Any]:
    """Both programs of each pair in turns; the first round fills the disk's cache and is not counted."""
    found: dict[str, Any] = {}
    for name, commands in pairs.items():
        runs = [[start(command) for command in commands] for _ in range(rounds + 1)][1:]
        entry: dict[str, Any] = {}
        for key in ("seconds", "processor_seconds"):
            own, other = ([run[index][key] for run in runs] for index in (0, 1))
            entry[key] = {"own": Times.of(own).p50, "diffusers": Times.of(other).p50,
                          "share": 1 / compare_rounds(other, own).ratio}  # fmt: skip
        peaks = [max(run[index]["peak_rss"] for run in runs) for index in (0, 1)]
        entry["peak_rss"] = {"own": peaks[0], "diffusers": peaks[1], "share": peaks[0] / peaks[1]}
        found[name] = entry
    return found


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path, exists=True))
@click.argument("folder", type=click.Path(path_type=Path, exists=True))
@click.option("--backend", default="auto", show_default=True)
@click.option("--precision", default="auto", show_default=True)
@click.option("--steps", default=4, show_default=True)
@click.option("--side", default=64, show_default=True, help="Pixels of a side of the picture.")
@click.option("--rounds", default=5, show_default=True)
def main(bundle: Path, folder: Path, backend: str, precision: str, steps: int, side: int, rounds: int) -> None:
    """Measure start-up of this project with BUNDLE and of diffusers with FOLDER, and print both as JSON."""
    program = str(Path(sys.executable).with_name("latentedge"))
    with tempfile.TemporaryDirectory() as output:
        picture = [program, "generate", str(bundle), PROMPT, "--steps", str(steps), "--size", str(side), "--seed", "0",
                   "--backend", backend, "--precision", precision, "-o", f"{output}/own.png"]  # fmt: skip
        theirs = [sys.executable, "-c", PICTURE, str(folder), PROMPT, str(steps), str(side), f"{output}/theirs.png"]
        pairs = {
            "help": ([program, "--help"], [sys.executable, "-c", HELP]),
            "first picture": (picture, theirs),
            "first picture, low memory": ([*picture, "--low-memory"], theirs),
        }
        click.echo(json.dumps(measure(pairs, rounds), indent=1))


if __name__ == "__main__":
    main()

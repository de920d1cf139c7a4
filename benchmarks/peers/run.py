"""``make bench-peers``: this project and each peer in turns, on the same weights, size, steps and threads.

One peer at a time runs beside this project's own process; in each round both compute the same once, and what counts is
the ratio within rounds. A peer that cannot be installed or fails is reported in its own words. Each peer's result is a
file of its own beside the output, and a later run measures only what has none yet.
"""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
import time
import venv
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import click

from latentedge.benchmarks.processes import MeasuredProcess, python_in
from latentedge.benchmarks.statistics import Times, compare_rounds
from latentedge.benchmarks.worker import PROMPT
from latentedge.runtime.bundle import Bundle, graph_precision
from latentedge.runtime.engines.base import EngineOptions
from latentedge.runtime.engines.hoisted import DENOISER, SHALLOW, part_name
from latentedge.runtime.errors import EngineError
from latentedge.runtime.generate_command import caching_from, guidance_from
from latentedge.runtime.machine import machine, usable_cores

HERE = Path(__file__).parent

#: Seconds of this project and of a peer, by round.
Pair = tuple[list[float], list[float]]

#: Pause before each turn: threads of ONNX Runtime and OpenMP go on spinning for a while after their last work, and would
#: take a core from whoever comes next.
SETTLING_SECONDS = 0.3

#: What is compared: a step by the clock and in processor seconds, the mean of a picture's steps, whole pictures.
MEASURED = ("step", "processor", "mean", "picture")

#: Guidance of every picture, which makes two evaluations of each step; ours may be asked for fewer.
GUIDANCE_SCALE = 7.5

#: Side of a picture in pixels, and pixels of a latent's side for the downscaling of the workload's decoder.
SIDES = {"sd15": (256, 8), "medium": (128, 4), "default": (64, 4)}


def environment_of(name: str, pins: list[str], root: Path, unwanted: Sequence[str] = ()) -> str:
    """The interpreter that has ``pins``: this one where it fits, else a virtual environment that is made on first use.

    ``unwanted`` are packages that the pins bring along and that break them.
    """
    if all(_fits(pin) for pin in pins):
        return sys.executable
    folder = root / name
    if not (folder / "complete").is_file():
        venv.create(folder, with_pip=True, clear=True)
        command = [python_in(folder), "-m", "pip", "install", "--quiet", *pins]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise EngineError(f"pip could not install {', '.join(pins)}: {done.stderr.strip().splitlines()[-1]}")
        if unwanted:
            command = [python_in(folder), "-m", "pip", "uninstall", "--quiet", "--yes", *unwanted]
            subprocess.run(command, capture_output=True, check=True)
        (folder / "complete").touch()
    return python_in(folder)


def _fits(pin: str) -> bool:
    name, _, wanted = pin.partition("==")
    try:
        return version(name.partition("[")[0]).partition("+")[0] == wanted
    except PackageNotFoundError:
        return False


@click.command()
@click.argument("workload", type=click.Choice(list(SIDES)))
@click.option("--folder", type=click.Path(path_type=Path), help="Its diffusers folder.  [default: made]")
@click.option("--bundle", type=click.Path(path_type=Path), help="Its bundle.  [default: made]")
@click.option("--environments", type=click.Path(path_type=Path), default=Path("build/peers"), show_default=True)
@click.option("--own", default="openvino:bf16", show_default=True, help="This project's setting, backend:precision.")
@click.option("--only", default="", help="Peers whose name holds this.")
@click.option("--threads", type=click.IntRange(min=1), help="Threads of each.  [default: physical cores]")
@click.option("--steps", default=4, show_default=True)
@click.option(
    "--own-interval", default="1", show_default=True, help="This project's step caching: every n-th step, or 0,2,5,9."
)
@click.option("--own-guidance", default=f"{GUIDANCE_SCALE}", help="This project's guidance, such as 7.5:every=0+1+2.")
@click.option("--rounds", default=5, show_default=True)
@click.option(
    "--pictures", default=1, show_default=True, help="Rounds in which whole pictures are drawn; 0: steps only."
)
@click.option("--dry-run", is_flag=True, help="Only say what would be measured, and about how long it takes.")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="JSON file.")
def main(workload: str, output: Path, only: str, dry_run: bool, **options: Any) -> None:
    """Measure this project beside each peer on WORKLOAD; remove a peer's file to measure it again."""
    table = json.loads((HERE / "peers.json").read_text(encoding="utf-8"))
    threads = options["threads"] or usable_cores()
    settings = {name: options[name] for name in ("own", "own_interval", "own_guidance", "steps", "rounds", "pictures")}
    settings |= {"workload": workload, "threads": threads, "machine": machine()}
    peers = [peer for peer in table["peers"] if only in peer["name"] and workload not in peer.get("not_for", ())]
    kept = {peer["name"]: _kept(result_file(output, peer["name"]), settings) for peer in peers}
    waiting = [peer for peer in peers if kept[peer["name"]] is None]
    click.echo(f"{len(waiting)} of {len(peers)} to measure, {_minutes(waiting, workload)}", err=True)
    for peer in waiting:
        click.echo(f"  {peer['name']}: {_minutes([peer], workload)}", err=True)
    if dry_run:
        return
    make_workload(workload, options, table["environments"]["diffusers"])
    for peer in waiting:
        row = _row(peer, table, workload, threads, options)
        click.echo(f"{peer['name']}\n{summary(row, options['own'])}", err=True)
        kept[peer["name"]] = row
        _write(result_file(output, peer["name"]), {**settings, "row": row})
    rows = [kept[peer["name"]] for peer in peers]
    _write(output, {**settings, "pins": table["environments"], "rows": rows})


def result_file(output: Path, peer: str) -> Path:
    """Where one peer's result lies: in a folder named like the output, under the peer's name."""
    return output.with_suffix("") / f"{re.sub(r'[^a-z0-9]+', '-', peer.lower()).strip('-')}.json"


def _kept(path: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The result of an earlier run with the same settings on this machine; one that failed is measured again."""
    if not path.is_file():
        return None
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    row: dict[str, Any] = found.pop("row")
    return row if found == settings and "failed" not in row else None


def _minutes(peers: list[dict[str, Any]], workload: str) -> str:
    """What was taken before, on two cores, with the environments made; exports of a peer's own are the larger part."""
    return f"about {sum(peer['minutes'][workload] for peer in peers):g} minutes"


def _write(path: Path, result: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def _row(
    peer: dict[str, Any], table: dict[str, Any], workload: str, threads: int, options: dict[str, Any]
) -> dict[str, Any]:
    name = peer["environment"]
    try:
        unwanted = table["unwanted"].get(name, ())
        python = environment_of(name, table["environments"][name], options["environments"], unwanted)
        return {"peer": peer["name"], **_measure(peer, python, workload, threads, options)}
    except EngineError as error:
        return {"peer": peer["name"], "failed": error.message}


def make_workload(workload: str, options: dict[str, Any], pins: list[str]) -> None:
    """The workload's diffusers folder and its bundle, made beside the environments where they are not given."""
    root = options["environments"]
    options["folder"] = options["folder"] or root / workload
    # The ranges of its INT8 graphs come from a picture of as many steps: one of 4 does not visit the noise that 20 do.
    options["bundle"] = options["bundle"] or root / f"{workload}-{options['steps']}.bundle"
    if not (options["folder"] / "model_index.json").is_file():
        python = environment_of("diffusers", pins, root)
        subprocess.run([python, str(HERE / "workload.py"), workload, str(options["folder"])], check=True)
    if not (options["bundle"] / "latentedge.json").is_file():
        # Peers are compiled for the one size that is drawn; ours takes every multiple of the UNet's lowest level.
        command = [str(Path(sys.executable).with_name("latentedge")), "export", "--even-sizes", str(options["folder"])]
        subprocess.run([*command, "-o", str(options["bundle"])], check=True)
    backend, precision = options["own"].split(":")
    if graph_precision(precision) == "int8" and not _has(options["bundle"], DENOISER, "int8"):
        _quantise(options["bundle"], SIDES[workload][0], backend, precision, options)
    prepare_bundle(
        options["bundle"],
        graph_precision(precision),
        caching=EngineOptions(**caching_from(options["own_interval"])).caching,
    )


def prepare_bundle(path: Path, precision: str, *, caching: bool) -> None:
    """The denoiser in parts, and with ``caching`` cut for step caching, where the bundle has not got them."""
    from latentedge.export.hoisting import hoist_bundle
    from latentedge.export.step_caching import cut_bundle

    if not _has(path, part_name(DENOISER, "step"), precision):
        hoist_bundle(path)
    if caching and not _has(path, part_name(DENOISER, SHALLOW), precision):
        cut_bundle(path)


def _has(path: Path, component: str, precision: str) -> bool:
    found = Bundle.open(path).manifest.components.get(component)
    return found is not None and precision in found.variants


def _quantise(path: Path, side: int, backend: str, precision: str, options: dict[str, Any]) -> None:
    """INT8 graphs for a bundle with random weights, and what they are worth here."""
    from latentedge.benchmarks.int8_untuned import judge, write_untuned
    from latentedge.calibration.scene import Target

    target = Target(backend, precision, precision.partition("+")[2] or "fp32", options["threads"])
    request = {"prompt": PROMPT, "steps": options["steps"], "height": side, "width": side, "seed": 0}
    request["guidance_scale"] = GUIDANCE_SCALE
    bundle = write_untuned(Bundle.open(path), request, backend, options["threads"])
    judge(bundle, target, request, lambda text: click.echo(text, err=True))


def summary(row: dict[str, Any], own: str) -> str:
    """One line about a peer."""
    if "failed" in row:
        return f"  failed: {row['failed']}"
    parts = []
    for what in MEASURED:
        if what in row:
            ratio = row[what]["ratio"]
            interval = f"{ratio['low']:.2f}-{ratio['high']:.2f}"
            parts.append(f"{what} {row[what]['own']['p50']:.3f} s against {row[what]['peer']['p50']:.3f} s, "
                         f"{ratio['ratio']:.2f} times as fast ({interval})")  # fmt: skip
    return f"  {own}: " + "; ".join(parts)


def _measure(peer: dict[str, Any], python: str, workload: str, threads: int, options: dict[str, Any]) -> dict[str, Any]:
    side, downscale = SIDES[workload]
    backend, precision = options["own"].split(":")
    request = {"steps": options["steps"], "height": side, "width": side, **guidance_from(options["own_guidance"])}
    settings = dict(peer["settings"])
    message = {
        "folder": str(options["folder"].absolute()),
        "threads": threads,
        "steps": min(options["steps"], settings.pop("most_steps", options["steps"])),
        "side": side,
        "prompt": PROMPT,
        **settings,
    }
    if peer["environment"] == "onnxruntime":
        message |= {"bundle": str(options["bundle"]), "side": side // downscale}
    if peer["environment"] in ("optimum", "openvino-genai"):
        message["cache"] = str((options["environments"] / f"{peer['environment']}-{workload}").absolute())
    with (
        MeasuredProcess("latentedge") as own,
        MeasuredProcess(peer["name"], (python, str(HERE / peer["worker"]))) as other,
    ):
        axes = {"batch": 2, "latent_height": side // downscale, "latent_width": side // downscale}
        loaded = own.ask(
            "load",
            bundle=str(options["bundle"]),
            backend=backend,
            precision=precision,
            request=request,
            options={"threads": threads, **caching_from(options["own_interval"])},
            only=None if options["pictures"] else {"unet": axes},
        )
        message["pictures"] = bool(options["pictures"])
        theirs = other.ask("load", **message)
        measured: dict[str, Pair] = {name: ([], []) for name in MEASURED}
        draws = peer["environment"] != "onnxruntime" and "most_steps" not in peer["settings"]
        for index in range(options["rounds"]):
            _step_round(own, other, measured)
            if index < options["pictures"]:
                _picture_round(own, other, measured, draws)
        found = {
            "steps": message["steps"],
            "first_picture_seconds": [loaded["first_picture_seconds"], theirs["first_picture_seconds"]],
            "memory": [own.ask("memory"), other.ask("memory")],
        }
        return found | {name: _result(*pair) for name, pair in measured.items() if pair[1]}


def _turn(process: MeasuredProcess, do: str, **message: Any) -> dict[str, Any]:
    time.sleep(SETTLING_SECONDS)
    return process.ask(do, **message)


def _step_round(own: MeasuredProcess, other: MeasuredProcess, measured: dict[str, Pair]) -> None:
    """One guided step of each, the second of two, so that what the other one left in the caches does not count."""
    answers = _turn(own, "component", name="unet", runs=2), _turn(other, "step", runs=2)
    for index, answer in enumerate(answers):
        measured["step"][index].append(answer["seconds"][-1])
        if "processor_seconds" in answers[1]:
            measured["processor"][index].append(answer["processor_seconds"][-1])


def _picture_round(own: MeasuredProcess, other: MeasuredProcess, measured: dict[str, Pair], draws: bool) -> None:
    """A picture of each that ``draws`` one. Ours may leave a part out of some steps: their mean, beside the peer's step."""
    answer = _turn(own, "picture")
    measured["mean"][0].append(sum(answer["steps"]) / len(answer["steps"]))
    measured["mean"][1].append(measured["step"][1][-1])
    if draws:
        measured["picture"][0].append(answer["seconds"])
        measured["picture"][1].append(_turn(other, "picture")["seconds"])


def _result(own: list[float], other: list[float]) -> dict[str, Any]:
    return {
        "own": dataclasses.asdict(Times.of(own)),
        "peer": dataclasses.asdict(Times.of(other)),
        "ratio": dataclasses.asdict(compare_rounds(other, own)),
        "samples": {"own": own, "peer": other},
    }


if __name__ == "__main__":
    main()

"""What each part of the calibration is worth: the same model and pictures with one part changed at a time.

python -m latentedge.benchmarks.int8_ablations BUNDLE --samples 12 --steps 20 --pictures 8
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from tempfile import TemporaryDirectory

import click
import numpy as np

from latentedge.benchmarks.int8_common import (
    Judge,
    Row,
    Setting,
    captured,
    full_plan,
    print_rows,
    with_graph,
    write_plan,
)
from latentedge.calibration import gate
from latentedge.calibration.applying import fit_corrections
from latentedge.calibration.gate import with_correction
from latentedge.calibration.options import Options, Reporter
from latentedge.calibration.pictures import differences, draw, summary
from latentedge.calibration.placement import SHORTCUTS
from latentedge.calibration.plan import Plan
from latentedge.calibration.quantise import Evidence
from latentedge.calibration.records import Probe
from latentedge.calibration.search import SearchSettings
from latentedge.runtime.engines import open_engine
from latentedge.runtime.pipeline import Pipeline


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--samples", default=12)
@click.option("--steps", default=20)
@click.option("--pictures", default=8)
@click.option("--prompts", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path))
def main(path: Path, samples: int, steps: int, pictures: int, prompts: Path | None, output: Path | None) -> None:
    """Measure every ablation on BUNDLE."""
    setting = Setting.of(path, samples, steps, pictures, prompts)
    rows: list[Row] = []
    with TemporaryDirectory(prefix="ablations-") as scratch:
        statistics, probes = captured(setting, Path(scratch) / "all")
        judge = Judge(setting, probes)
        options = setting.options()
        plan, evidence = full_plan(setting, statistics, probes, options)
        rows.append(_row(judge, "everything", plan, evidence))
        without = plan.quantised_blocks() - {SHORTCUTS}
        rows.append(_row(judge, "shortcuts in float", plan.with_blocks(without), evidence))
        for name, changed in variations(options):
            rows.append(_row(judge, name, *full_plan(setting, statistics, probes, changed)))
        split = dataclasses.replace(plan, split=())
        rows.append(_row(judge, "shortcut split off", split, evidence))
        rows.append(_corrected(judge, plan, evidence, probes))
        for fraction in (0.0, 0.5, 1.0):
            single, _ = captured(setting, Path(scratch) / f"single{fraction}", fraction)
            name = f"one timestep, {fraction:.0%} of the way"
            rows.append(_row(judge, name, *full_plan(setting, single, probes, options)))
    print_rows(rows, output)


def variations(options: Options) -> list[tuple[str, Options]]:
    """Searches with a part left out."""
    base = SearchSettings()
    changes = {f"only {name}": SearchSettings((name,), balance=False) for name in base.observers}
    changes["balancing off"] = dataclasses.replace(base, balance=False)
    changes["weight clipping off"] = dataclasses.replace(base, clip_weights=False)
    changes["bias correction off"] = dataclasses.replace(base, correct_bias=False)
    return [(name, dataclasses.replace(options, search=search)) for name, search in changes.items()]


def _row(judge: Judge, name: str, plan: Plan, evidence: Evidence) -> Row:
    folder = judge.setting.bundle.variant("unet", "fp32")[0].parent
    graph = write_plan(judge.setting.bundle, plan, evidence, folder / ".ablation.onnx")
    try:
        return judge.row(name, graph)
    finally:
        graph.unlink()


def _corrected(judge: Judge, plan: Plan, evidence: Evidence, probes: list[Probe]) -> Row:
    """Pictures with the correction by timestep in the sampler's loop."""
    bundle = judge.setting.bundle
    folder = bundle.variant("unet", "fp32")[0].parent
    graph = write_plan(bundle, plan, evidence, folder / ".ablation.onnx")
    precision = judge.setting.precision
    try:
        trial = with_graph(bundle, graph)
        records = fit_corrections(trial, plan, probes, judge.target, Reporter())
        trial = with_correction(trial, precision, {**records[precision], "applied": True})
        with (
            open_engine(trial, "unet", judge.target.backend, precision, judge.target.options) as engine,
            Pipeline(
                trial, judge.target.backend, precision, judge.target.options, engines={"unet": engine}
            ) as pipeline,
        ):
            drawn = draw(pipeline, judge.setting.held_out())
            sqnr_db = gate.mean_sqnr(probes, gate.outputs_of(engine, probes))
        mean, worst = summary(differences(judge.reference, drawn))
    finally:
        graph.unlink()
    gained = records[precision]["sqnr_db_gained"]
    return Row("correction by timestep on", mean, worst, float(np.float64(sqnr_db + gained)))


if __name__ == "__main__":
    main()

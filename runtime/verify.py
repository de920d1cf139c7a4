"""``latentedge verify``: is the bundle whole, and does it still compute here what the original computed?"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np

from latentedge.runtime import selection
from latentedge.runtime.bundle import Array, Bundle, Component, TokenizerFile, Variant, file_sha256
from latentedge.runtime.engines import BACKENDS, EngineOptions, open_engine
from latentedge.runtime.engines.settings import parse_backend
from latentedge.runtime.errors import LatentEdgeError, PrecisionError, UsageError
from latentedge.runtime.parity import FLOORS, TensorParity, compare

OK, FAILED, SKIPPED = "ok", "FAILED", "skipped"

#: Inputs and reference outputs of one recorded comparison.
Vector = tuple[dict[str, Array], dict[str, Array]]


@dataclass(frozen=True)
class Check:
    """One thing that was looked at: "file", "tokenizer", "graph" or "parity"; what, the outcome, and numbers."""

    kind: str
    subject: str
    status: str
    detail: str = ""


@dataclass(frozen=True)
class Report:
    """All checks of a bundle with one backend."""

    bundle: str
    backend: str
    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing failed."""
        return all(check.status != FAILED for check in self.checks)


def verify_bundle(path: str | Path, backend: str = "auto", precision: str | None = None) -> Report:
    """Hash every file, encode the golden prompts, open every graph with ``backend`` and rerun the recorded parity.

    ``precision`` checks one precision only; :class:`UsageError` if no component has it. What fails is in the report;
    errors are raised only for a folder that is not a bundle and a backend that is not there.
    """
    bundle = Bundle.open(path)
    backend, options = parse_backend(backend, EngineOptions())
    name = selection.choose(bundle, backend).backend
    # The denoiser's parts are for the backends that run them.
    components = [c for c in bundle.manifest.components.values() if "." not in c.name or BACKENDS[name].hoisting]
    if precision is not None and not any(precision in component.variants for component in components):
        raise UsageError(f"{bundle.path} has no component in {precision}.")
    checks = [*_check_files(bundle)]
    damaged = {check.subject for check in checks if check.status == FAILED}
    for tokenizer, record in bundle.manifest.tokenizers.items():
        checks.append(_check_tokenizer(bundle, tokenizer, record, damaged))
    for component in components:
        for variant_precision in component.variants:
            if precision in (None, variant_precision):
                asked = precision is not None
                checks += _check_graph(bundle, component, variant_precision, (name, options), damaged, asked)
    return Report(str(bundle.path), name, tuple(checks))


def _recorded_files(bundle: Bundle) -> Iterator[tuple[str, str]]:
    """Every file of the manifest with its digest."""
    for component in bundle.manifest.components.values():
        for variant in component.variants.values():
            yield variant.path, variant.sha256
            yield from variant.external_data.items()
        for record in (component.parity, *map(_own_parity, component.variants.values())):
            if "vectors" in record:
                yield record["vectors"], record["vectors_sha256"]
    for tokenizer in bundle.manifest.tokenizers.values():
        yield tokenizer.path, tokenizer.sha256
    yield from bundle.manifest.files.items()


def _check_files(bundle: Bundle) -> Iterator[Check]:
    for relative, expected in _recorded_files(bundle):
        try:
            found = file_sha256(bundle.file(relative))
        except (LatentEdgeError, OSError) as error:
            yield Check("file", relative, FAILED, str(getattr(error, "message", error)))
            continue
        if found == expected:
            yield Check("file", relative, OK)
        else:
            yield Check("file", relative, FAILED, f"SHA-256 is {found[:12]}, expected {expected[:12]}: it was changed")
    schedule = bundle.path / "scheduler" / "scheduler_config.json"
    if schedule.is_file():
        same = _read_json(schedule) == json.loads(json.dumps(bundle.manifest.scheduler_config()))
        yield Check(
            "file",
            "scheduler/scheduler_config.json",
            OK if same else FAILED,
            "" if same else "it differs from the manifest's schedule, which the runtime follows",
        )


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _check_tokenizer(bundle: Bundle, name: str, record: TokenizerFile, damaged: set[str]) -> Check:
    from tokenizers import Tokenizer

    if record.path in damaged:
        return Check("tokenizer", name, SKIPPED, "its file is damaged")
    tokenizer = Tokenizer.from_file(str(bundle.file(record.path)))
    for prompt, ids in record.golden.items():
        found = tuple(tokenizer.encode(prompt).ids)
        if found != ids:
            return Check("tokenizer", name, FAILED, f"{prompt!r} gives {list(found)[:8]}, expected {list(ids)[:8]}")
    detail = f"{len(record.golden)} prompts give the recorded ids" if record.golden else "no ids were recorded"
    return Check("tokenizer", name, OK, detail)


def _check_graph(
    bundle: Bundle,
    component: Component,
    precision: str,
    backend: tuple[str, EngineOptions],
    damaged: set[str],
    asked: bool,
) -> Iterator[Check]:
    subject = f"{component.name} {precision}"
    variant = component.variants[precision]
    needed = {variant.path, *variant.external_data}
    if needed & damaged:
        yield Check("graph", subject, SKIPPED, "its file is damaged")
        return
    try:
        with open_engine(bundle, component.name, backend[0], precision, backend[1]) as engine:
            yield Check("graph", subject, OK, f"opened by {backend[0]}")
            vectors = _vectors(bundle, _own_parity(variant) or component.parity, damaged)
            if not vectors:
                yield Check("parity", subject, SKIPPED, str(component.parity.get("note", "nothing was recorded")))
                return
            worst: dict[str, TensorParity] = {}
            uncovered = ""
            for inputs, outputs in vectors:
                try:
                    engine.bind(**component.axes_of(inputs))
                except UsageError as error:
                    # A built engine takes the shapes that it was built for.
                    uncovered = error.message
                    continue
                computed = engine.run(inputs)
                for name, reference in outputs.items():
                    found = compare(reference, computed[name])
                    worst[name] = found.worse_of(worst[name]) if name in worst else found
    except LatentEdgeError as error:
        # A device without this precision is a fault only where the caller asked for it.
        refused = isinstance(error, PrecisionError) and not asked
        yield Check("graph", subject, SKIPPED if refused else FAILED, error.message)
        return
    if worst:
        yield _judge(subject, worst, floor_of(variant, precision))
    else:
        yield Check("parity", subject, SKIPPED, uncovered)


def _judge(subject: str, worst: dict[str, TensorParity], floor: float | None) -> Check:
    name, found = min(worst.items(), key=lambda item: item[1].psnr_db)
    detail = f"{name}: {found.describe()}"
    if floor is None:
        return Check("parity", subject, SKIPPED, f"{detail}; no floor was recorded for this precision")
    return Check("parity", subject, OK if found.psnr_db >= floor else FAILED, f"{detail}, floor {floor:g} dB")


def floor_of(variant: Variant, precision: str) -> float | None:
    """The floor that a variant was recorded with, or the precision's own; ``None`` where neither is there."""
    for record in variant.measured:
        if record.get("kind") == "parity" and "floor_psnr_db" in record:
            return float(record["floor_psnr_db"])
    return FLOORS.get(precision)


def _own_parity(variant: Variant) -> dict[str, Any]:
    """A variant's parity record with cases of its own: a quantised graph's outputs as they were when it was written."""
    return next((entry for entry in variant.measured if entry.get("kind") == "parity" and "vectors" in entry), {})


def _vectors(bundle: Bundle, parity: Mapping[str, Any], damaged: set[str]) -> list[Vector]:
    """The recorded cases of a parity record; empty where none were recorded or their file is damaged."""
    relative = parity.get("vectors")
    if relative is None or relative in damaged:
        return []
    cases: dict[str, Vector] = {}
    with np.load(bundle.file(relative), allow_pickle=False) as archive:
        for key in archive.files:
            index, side, name = key.split("/", 2)
            cases.setdefault(index, ({}, {}))[0 if side == "input" else 1][name] = archive[key]
    return list(cases.values())


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--backend", default="auto", show_default=True, help="Engine library that runs the recorded parity.")
@click.option("--precision", help="Check this precision only.")
@click.option("--json", "as_json", is_flag=True, help="Write the report to stdout as JSON.")
def verify(bundle: Path, backend: str, precision: str | None, as_json: bool) -> int:
    """Check a bundle's files, tokenizers, graphs and recorded results on this machine."""
    report = verify_bundle(bundle, backend, precision)
    if as_json:
        click.echo(json.dumps({"ok": report.ok, **dataclasses.asdict(report)}, indent=2))
    else:
        for check in report.checks:
            click.echo(f"{check.status:8} {check.kind:10} {check.subject}{'  ' if check.detail else ''}{check.detail}")
    failed = [check for check in report.checks if check.status == FAILED]
    if failed:
        click.echo(f"{len(failed)} of {len(report.checks)} checks failed", err=True)
        return 1
    click.echo(f"{len(report.checks)} checks, none failed ({report.backend})", err=True)
    return 0

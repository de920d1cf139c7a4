"""From a source model to a proven bundle: each component is built, exported, compared and freed before the next."""

from __future__ import annotations

import dataclasses
import gc
import importlib.metadata
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx_ir as ir

from latentedge.export import bundle_writer
from latentedge.export.model import ComponentSource, SourceModel
from latentedge.export.onnx_files import remove_model, save_model, variant_of
from latentedge.export.onnx_from_torch import module_path, onnx_from_torch
from latentedge.export.parity import Case, Measurement, cases_without_reference, measure, require, with_reference
from latentedge.export.passes import cleanup
from latentedge.export.passes.splitting import split_linear_layers
from latentedge.export.passes.upsampling import convolve_before_doubling
from latentedge.export.precision import half_from_onnx
from latentedge.export.preview import fit_preview
from latentedge.export.session import HostSession
from latentedge.export.targets import DEFAULT_TARGET, Target, target
from latentedge.runtime.bundle import Bundle, Component, Latent, Manifest, Variant
from latentedge.runtime.errors import UsageError
from latentedge.runtime.parity import FLOORS

#: Precisions that the exporter writes; INT8 is written by calibration.
PRECISIONS = ("fp32", "fp16")
#: How each precision is computed for the comparison.
COMPUTED_BY = {
    "fp32": "onnxruntime cpu",
    "fp16": "onnxruntime cpu, every operator's result rounded to float16",
}
REFERENCE_MISSING = "reference not available"


@dataclass(frozen=True)
class ExportOptions:
    """What to write. ``notify`` is told what the user should know, ``progress`` (component, stage) as work goes on."""

    precisions: tuple[str, ...] = ("fp32",)
    target: str = DEFAULT_TARGET
    overwrite: bool = False
    notify: Callable[[str], None] = field(default=lambda message: None)
    progress: Callable[[str, str], None] = field(default=lambda component, stage: None)


def export_source(model: SourceModel, output: Path, options: ExportOptions) -> Bundle:
    """Write ``model`` as a bundle at ``output``.

    Nothing is left at ``output`` when any part fails: :class:`ParityError` for a component that does not reproduce
    the original, :class:`ExportError` for one that has no ONNX form, :class:`UsageError` for an ``output`` that may
    not be replaced or a precision that is not written here.
    """
    check_precisions(options.precisions)
    chosen = target(options.target)
    for message in model.messages:
        options.notify(message)
    with bundle_writer.staged(output, overwrite=options.overwrite) as folder:
        latent = model.latent
        components: dict[str, Component] = {}
        for source in model.components:
            exported = _ComponentExport(folder, source, chosen, options)
            components[source.spec.name] = exported.run()
            if source.spec.name == "vae_decoder" and latent.preview is None:
                latent = exported.with_preview(latent)
            exported.finish()
            gc.collect()
        _write_bundle(folder, model, latent, components, chosen)
        Bundle.open(folder)
    return Bundle.open(output)


def check_precisions(precisions: tuple[str, ...]) -> None:
    """:class:`UsageError` for a precision that is not written here."""
    unknown = [name for name in precisions if name not in PRECISIONS]
    if unknown or not precisions:
        raise UsageError(
            f"export writes the precisions {', '.join(PRECISIONS)}, found {', '.join(unknown) or 'none'}.",
            hint="int8 is written by `latentedge calibrate BUNDLE`"
            if "int8" in unknown
            else "name one or both, as in `--precision fp32,fp16`",
        )


class _ComponentExport:
    """One component on its way into the bundle's folder."""

    def __init__(self, folder: Path, source: ComponentSource, target: Target, options: ExportOptions) -> None:
        self.folder = folder
        self.source = source
        self.target = target
        self.options = options
        self.name = source.spec.name
        self.fp32 = folder / self.name / "model.onnx"
        self.measured: dict[str, list[dict[str, Any]]] = {}
        self.parity: dict[str, Any] = {}

    def run(self) -> Component:
        """Write and prove every precision; gives the component for the manifest."""
        if self.source.build is None:
            self._copy_graphs()
        else:
            cases = self._trace()
            self._prove(cases)
        written = {precision: self._path(precision) for precision in self.options.precisions}
        variants = {precision: variant_of(self.folder, path) for precision, path in written.items()}
        variants = {
            precision: dataclasses.replace(variant, measured=tuple(self.measured.get(precision, ())))
            for precision, variant in variants.items()
        }
        self._report(variants)
        if self.source.config:
            bundle_writer.write_json(self.folder / self.name / "config.json", self.source.config)
        return dataclasses.replace(self.source.spec, variants=variants, parity=self.parity)

    def with_preview(self, latent: Latent) -> Latent:
        """``latent`` with the preview map of this decoder."""
        self._progress("preview")
        axes = self.source.trace_axes or {name: axis.opt for name, axis in self.source.spec.axes.items()}
        with HostSession(self.fp32) as session:
            return dataclasses.replace(latent, preview=fit_preview(session.run, self.source.spec, latent, axes))

    def finish(self) -> None:
        """Delete the float32 graph when only float16 was asked for."""
        if "fp32" not in self.options.precisions:
            remove_model(self.fp32)

    def _path(self, precision: str) -> Path:
        return self.fp32 if precision == "fp32" else self.fp32.with_name(f"model.{precision}.onnx")

    def _progress(self, stage: str) -> None:
        self.options.progress(self.name, stage)

    def _trace(self) -> list[Case]:
        """Build the module, run the original on every case, and write the float32 graph; the module is freed."""
        assert self.source.build is not None
        self._progress("load")
        module = self.source.build().eval()
        self._progress("original")
        cases = list(with_reference(module, self.source.spec, cases_without_reference(self.source)))
        self._progress("trace")
        graph = onnx_from_torch(module, self.source.spec, cases[0].inputs, self.target)
        paths = {node: module_path(node) for node in graph.graph}
        cleanup.clean_up(graph)
        parameters = {name for name, _ in (*module.named_parameters(), *module.named_buffers())}
        cleanup.name_by_module(graph, paths, parameters)
        split_linear_layers(graph)
        convolve_before_doubling(graph)
        cleanup.strip_metadata(graph)
        cleanup.check(self.name, graph, self.target)
        self._progress("write")
        save_model(graph, self.fp32)
        return cases

    def _prove(self, cases: list[Case]) -> None:
        self._progress("compare fp32")
        with HostSession(self.fp32) as session:
            measurement = measure(session.run, cases)
        self._accept("fp32", measurement)
        if "fp16" in self.options.precisions:
            self._progress("fp16")
            half = half_from_onnx(self.fp32, self._path("fp16"), self.name, cases, self.options.notify)
            self._accept("fp16", half.measurement)
            # The comparison runs a graph that rounds; the written one must load and run as well.
            with HostSession(self._path("fp16")) as session:
                require(self.name, "fp16", measure(session.run, [min(cases, key=Case.size)]))
            self.measured["fp16"].append(
                {"kind": "float32_nodes", "nodes": half.nodes, "float32": len(half.kept), "reasons": half.kept}
            )
        self.parity |= bundle_writer.write_vectors(self.folder, self.source.spec, cases)

    def _accept(self, precision: str, measurement: Measurement) -> None:
        import torch

        require(self.name, precision, measurement)
        record = measurement.record(FLOORS[precision], f"torch {torch.__version__}", COMPUTED_BY[precision])
        self.measured[precision] = [record]
        self.parity[precision] = {key: record[key] for key in ("psnr_db", "max_abs_error", "floor_psnr_db", "cases")}

    def _copy_graphs(self) -> None:
        """Take graphs that are ONNX already, as they are; there is no original to compare with."""
        self.parity["note"] = REFERENCE_MISSING
        for precision in self.options.precisions:
            if precision not in self.source.onnx_files:
                raise UsageError(
                    f"{self.name} is there in {', '.join(self.source.onnx_files)}, not in {precision}.",
                    hint="ask for what is there with --precision",
                )
            self._progress(f"copy {precision}")
            model = ir.load(self.source.onnx_files[precision])
            if self.source.adapt is not None:
                self.source.adapt(model)
            cleanup.check(self.name, model, self.target)
            save_model(model, self._path(precision))
            self.measured[precision] = [{"kind": "parity", "note": REFERENCE_MISSING}]
            del model

    def _report(self, variants: dict[str, Variant]) -> None:
        report = {
            "component": self.name,
            "target": self.target.name,
            "parity": self.parity,
            "variants": {name: list(variant.measured) for name, variant in variants.items()},
        }
        bundle_writer.write_json(self.folder / "reports" / "parity" / f"{self.name}.json", report)


def _write_bundle(
    folder: Path, model: SourceModel, latent: Latent, components: dict[str, Component], chosen: Target
) -> None:
    tokenizers = {
        name: bundle_writer.write_tokenizer(folder, name, source) for name, source in model.tokenizers.items()
    }
    bundle_writer.write_model_index(folder, model)
    manifest = Manifest(
        family=model.family,
        task=model.task,
        source=model.source,
        created_with=created_with(chosen),
        latent=latent,
        conditioning=model.conditioning,
        schedule=dict(model.schedule),
        defaults=model.defaults,
        components=components,
        tokenizers=tokenizers,
        calibration=dict(model.captions),
        files=bundle_writer.described_files(folder, [record.path for record in tokenizers.values()]),
    )
    if model.schedule:
        bundle_writer.write_json(folder / "scheduler" / "scheduler_config.json", manifest.scheduler_config())
    bundle_writer.write_manifest(folder, manifest)


def created_with(chosen: Target) -> dict[str, str]:
    """Versions that made the bundle, its target, and the time in UTC."""
    packages = ("latentedge", "torch", "onnx", "onnxscript", "onnxruntime")
    versions = {name: importlib.metadata.version(name) for name in packages}
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return {**versions, "target": chosen.name, "opset": str(chosen.opset), "time": now}

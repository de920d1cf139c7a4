"""Backends that compile a graph when they load it: the denoiser in parts, and times to measure and record."""

from __future__ import annotations

from latentedge.export.builders import BuildRequest, BuildRow, components_to_build
from latentedge.export.latency import measure_bundle
from latentedge.export.parts_builder import prepare
from latentedge.runtime.engines import backend as find_backend
from latentedge.runtime.errors import UsageError
from latentedge.runtime.machine import machine_fingerprint
from latentedge.runtime.selection import latency_record


def build(request: BuildRequest) -> list[BuildRow]:
    """Split the denoiser, open every graph with the backend, time it on this machine and record that in the manifest.

    :class:`UsageError` for settings that only a compiler has; :class:`EngineError` when a graph does not open or run.
    """
    find_backend(request.backend)
    request.refuse_others("--plan step-caching")
    if request.precisions:
        raise UsageError(
            f"the backend {request.backend} times every precision, because a time alone says nothing; "
            f"asked for: {', '.join(request.precisions)}.",
            hint="leave --precision out",
        )
    bundle = measure_bundle(prepare(request), request.backend, request.notify)
    machine = machine_fingerprint()
    rows = []
    for component in components_to_build(bundle, request.backend):
        for precision in component.variants:
            record = latency_record(component, request.backend, precision, machine)
            if record is not None:
                rows.append(BuildRow(component.name, precision, "this machine", record["seconds"]))
    return rows

"""What the INT8 graph itself computes, recorded so that ``latentedge verify`` can run it again anywhere."""

from __future__ import annotations

import dataclasses
import io
from typing import Any

import numpy as np
import onnxruntime

from latentedge.calibration.candidates import with_component
from latentedge.calibration.plan import write_atomically
from latentedge.calibration.records import Probe
from latentedge.runtime.bundle import Bundle, file_sha256
from latentedge.runtime.engines import EngineOptions, open_engine
from latentedge.runtime.parity import TensorParity, compare

#: Recorded evaluations: of the probes, the ones nearest to the beginning and the end of the trajectory.
CASES = 2
#: Another library has to reach the graph's own PSNR against fp32, less this. The arithmetic between Q and DQ is exact, but
#: float rounding before a Q moves values by one level, and what follows spreads that: two libraries were 3 to 20 dB closer
#: to each other than to fp32.
BELOW_OWN_DB = 3.0


def with_parity(bundle: Bundle, component: str, probes: list[Probe], threads: int | None) -> Bundle:
    """The bundle, in memory, with a parity record for its INT8 graph; the arrays are written to ``reports/parity``.

    ``vectors`` hold inputs of the fp32 trajectory and what ONNX Runtime computes from the INT8 graph; ``psnr_db`` is how
    far that is from the fp32 graph's output. Nothing is recorded where fp32 itself gives no finite output.
    """
    usable = [probe for probe in probes if np.isfinite(probe.output).all()]
    if not usable:
        return bundle
    ordered = sorted(usable, key=lambda probe: probe.timestep)
    chosen = [ordered[index] for index in np.linspace(0, len(ordered) - 1, min(CASES, len(ordered))).astype(int)]
    arrays: dict[str, Any] = {}
    worst: TensorParity | None = None
    with open_engine(bundle, component, "onnxruntime", "int8", EngineOptions(threads=threads)) as engine:
        output = engine.component.outputs[0].name
        for number, probe in enumerate(chosen):
            computed = engine.run(probe.inputs)[output]
            arrays |= {f"{number}/input/{name}": array for name, array in probe.inputs.items()}
            arrays[f"{number}/output/{output}"] = computed
            found = compare(probe.output, computed)
            worst = found if worst is None else worst.worse_of(found)
    assert worst is not None
    relative = f"reports/parity/{component}.int8.npz"
    stream = io.BytesIO()
    np.savez_compressed(stream, **arrays)
    write_atomically(bundle.path / relative, stream.getvalue())
    record = {
        "kind": "parity",
        "psnr_db": worst.psnr_db,
        "max_abs_error": worst.max_abs_error,
        "cases": len(chosen),
        "reference": "the fp32 graph over the trajectory",
        "computed_by": f"onnxruntime {onnxruntime.__version__}",
        "vectors": relative,
        "vectors_sha256": file_sha256(bundle.path / relative),
        "floor_psnr_db": worst.psnr_db - BELOW_OWN_DB,
    }
    owner = bundle.component(component)
    variant = owner.variants["int8"]
    others = tuple(entry for entry in variant.measured if entry.get("kind") != "parity")
    variant = dataclasses.replace(variant, measured=(record, *others))
    changed = dataclasses.replace(owner, variants={**owner.variants, "int8": variant})
    return Bundle(bundle.path, with_component(bundle.manifest, changed))

"""What is made ahead for backends that compile when they load: the denoiser in parts, each library's own form of it."""

from __future__ import annotations

from latentedge.export.builders import BuildRequest, components_to_build
from latentedge.export.hoisting import REFERENCE, hoist_bundle
from latentedge.export.step_caching import cut_bundle
from latentedge.runtime.bundle import Bundle, graph_precision
from latentedge.runtime.engines import EngineOptions, open_engine
from latentedge.runtime.engines.hoisted import DENOISER
from latentedge.runtime.errors import PrecisionError
from latentedge.runtime.selection import PRECISIONS


def prepare(request: BuildRequest) -> Bundle:
    """Split the bundle's denoiser into its loop-invariant parts; gives the bundle as it is then.

    With ``--plan step-caching`` also the full and shallow graphs. OpenVINO's compiled models, for the lengths that the
    axes are best at, and ONNX Runtime's optimised graphs are kept in the bundle's ``engines``, where the runtime finds
    them.
    """
    bundle = split_denoiser(request)
    if request.backend == "openvino":
        _compile(bundle, request)
    elif request.backend == "onnxruntime":
        from latentedge.export.onnxruntime_graphs import optimise_bundle

        optimise_bundle(bundle, request)
    return bundle


def split_denoiser(request: BuildRequest) -> Bundle:
    """The bundle with its denoiser's parts, and with ``--plan step-caching`` the full and shallow graphs, written anew."""
    path = request.bundle.path
    components = request.bundle.manifest.components
    if DENOISER in components and REFERENCE in components[DENOISER].variants:
        names = hoist_bundle(path)
        request.notify(f"denoiser in parts: {', '.join(names)}" if names else "the denoiser has nothing to hoist")
        if request.step_caching:
            request.notify(f"step caching: {', '.join(cut_bundle(path))}")
    return Bundle.open(path)


def _compile(bundle: Bundle, request: BuildRequest) -> None:
    options = EngineOptions(hoisting=False, cache=request.cache or bundle.path / "engines")
    for component in components_to_build(bundle, request.backend):
        for precision in PRECISIONS[request.backend]:
            if graph_precision(precision) in component.variants:
                try:
                    with open_engine(bundle, component.name, request.backend, precision, options) as engine:
                        engine.bind(**{name: axis.opt for name, axis in component.axes.items()})
                except PrecisionError as error:
                    request.notify(f"{component.name} in {precision} was not compiled: {error.message}")

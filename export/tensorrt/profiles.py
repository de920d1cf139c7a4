"""Axis lengths of a component's engine, from the pictures that it has to serve."""

from __future__ import annotations

from latentedge.export.builders import BuildRequest, Range
from latentedge.runtime.bundle import Axis, Bundle, Component
from latentedge.runtime.errors import UsageError
from latentedge.runtime.selection import DENOISER

SIDES = ("latent_height", "latent_width")


def engine_axes(request: BuildRequest, component: Component) -> dict[str, Axis]:
    """Shortest, best and longest length by axis; all three are equal unless a range was asked for.

    The batch is the number of pictures, and for the denoiser times the branches of guidance, which the manifest's
    best batch tells; the other networks take from one picture's prompt to their own best batch. A range's lower end is
    the shortest batch without guidance. :class:`UsageError` names an axis
    that the network was not exported for.
    """
    axes = {}
    for name, axis in component.axes.items():
        if name == "batch":
            axes[name] = _batch(request, component)
        elif name in SIDES and request.size is not None:
            axes[name] = _side(request.bundle, component.name, name, axis, request.size[SIDES.index(name)])
        else:
            axes[name] = Axis(axis.opt, axis.opt, axis.opt, axis.multiple)
    for name, axis in axes.items():
        _check(component, name, axis)
    return axes


def _batch(request: BuildRequest, component: Component) -> Axis:
    pictures = request.batch or Range(1, 1)
    branches = component.axes["batch"].opt if component.name == DENOISER and not request.low_memory else 1
    if component.name != DENOISER:
        return Axis(pictures.low, pictures.low, max(pictures.high, component.axes["batch"].opt))
    if pictures.low == pictures.high:
        return Axis(branches * pictures.low, branches * pictures.low, branches * pictures.low)
    return Axis(pictures.low, branches * pictures.low, branches * pictures.high)


def _side(bundle: Bundle, component: str, name: str, axis: Axis, pixels: Range) -> Axis:
    manifest = bundle.manifest
    # A super-resolution model's size is its low-resolution picture's, which is as large as the latent.
    unit = 1 if manifest.task == "super-resolution" else manifest.latent.downscale
    step = unit * axis.multiple
    if pixels.low % step or pixels.high % step:
        raise UsageError(f"{component}: --size must be multiples of {step}, found {pixels.low}..{pixels.high}.")
    low, high = pixels.low // unit, pixels.high // unit
    return Axis(low, min(max(axis.opt, low), high), high, axis.multiple)


def _check(component: Component, name: str, asked: Axis) -> None:
    known = component.axes[name]
    if asked.min < known.min or asked.max > known.max:
        raise UsageError(
            f"{component.name} was exported for {name} {known.min}..{known.max}, asked for: {asked.min}..{asked.max}."
        )

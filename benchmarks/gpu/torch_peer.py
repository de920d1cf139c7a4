"""The original network in torch on the GPU, eager and compiled."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from latentedge.export.model import ComponentSource
from latentedge.runtime.bundle import Array


def torch_runs(component: ComponentSource, inputs: Mapping[str, Array]) -> dict[str, Callable[[], None]]:
    """A function by name that computes ``component`` once and waits for it: fp32, fp16, and fp16 compiled.

    Compiling happens in the first call.
    """
    import torch

    if component.build is None:
        return {}
    runs: dict[str, Callable[[], None]] = {}
    arguments = [torch.from_numpy(inputs[spec.name]).cuda() for spec in component.spec.inputs]

    def timed(module: Callable[..., object], given: list[torch.Tensor]) -> Callable[[], None]:
        def run() -> None:
            with torch.inference_mode():
                module(*given)
            torch.cuda.synchronize()

        return run

    runs["torch fp32"] = timed(component.build().cuda(), arguments)
    half = component.build().cuda().half()
    halves = [value.half() if value.is_floating_point() else value for value in arguments]
    runs["torch fp16"] = timed(half, halves)
    runs["torch.compile fp16"] = timed(torch.compile(half, mode="max-autotune"), halves)
    return runs

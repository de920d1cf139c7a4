"""The original network in torch on the GPU, eager and compiled."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from latentedge.export.model import ComponentSource
from latentedge.runtime.bundle import Array
from latentedge.runtime.errors import MissingDependencyError


def torch_runs(
    component: ComponentSource, inputs: Mapping[str, Array], *, autotune: bool = False, device: str = "cuda"
) -> dict[str, Callable[[], None]]:
    """A function by name that computes ``component`` once and waits for it: fp32, fp16, and fp16 compiled.

    Compiling happens in the first call, and uses CUDA graphs. fp32 is without TF32, as in the other engines.
    """
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise MissingDependencyError("torch sees no GPU here.")
    if component.build is None:
        return {}
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    runs: dict[str, Callable[[], None]] = {}
    arguments = [torch.from_numpy(inputs[spec.name]).to(device) for spec in component.spec.inputs]

    def timed(module: Callable[..., object], given: list[torch.Tensor]) -> Callable[[], None]:
        def run() -> None:
            with torch.inference_mode():
                module(*given)
            if device == "cuda":
                torch.cuda.synchronize()

        return run

    runs["torch fp32"] = timed(component.build().to(device), arguments)
    half = component.build().to(device).half()
    halves = [value.half() if value.is_floating_point() else value for value in arguments]
    runs["torch fp16"] = timed(half, halves)
    mode = "max-autotune" if autotune else "reduce-overhead"
    runs[f"torch.compile {mode} fp16"] = timed(torch.compile(half, mode=mode), halves)
    return runs

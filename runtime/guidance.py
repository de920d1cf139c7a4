"""Guidance: how the outputs of several evaluations of a model become one.

A ``Combine`` takes the outputs, float32 [N, C, h, w] each, in the order that its maker states, and gives one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from latentedge.runtime.errors import UsageError
from latentedge.runtime.samplers.plans import Plan
from latentedge.runtime.schedules import Array, alpha_sigma, exp32, log32

Combine = Callable[[Sequence[Array]], Array]

#: What a kept difference is multiplied by for each evaluation since it was computed: one that is carried on unchanged
#: steers too far, since nothing shows it that the sample has followed (measured: ``docs/speed.md``).
FADING = 0.9
LOWEST_ALPHA = 0.1


def only(outputs: Sequence[Array]) -> Array:
    """The single output: no guidance."""
    return outputs[0]


def classifier_free(scale: float, rescale: float = 0.0) -> Combine:
    """Combine [unconditional, conditional]: Ho & Salimans 2022 (arXiv 2207.12598), equation 6.

    ``rescale`` 0 to 1 brings the standard deviation of each picture back to the conditional's.
    """
    if not 0 <= rescale <= 1:
        raise UsageError(f"guidance_rescale must be between 0 and 1, found {rescale}")

    factor = np.float32(scale)

    def combine(outputs: Sequence[Array]) -> Array:
        unconditional, conditional = outputs
        guided = unconditional + factor * (conditional - unconditional)
        return rescaled(guided, conditional, rescale) if rescale else guided

    return combine


def rescaled(guided: Array, conditional: Array, share: float) -> Array:
    """``guided`` with ``share`` of it at the conditional's standard deviation: Lin et al. 2023 (arXiv 2305.08891), 3.4."""
    axes = tuple(range(1, guided.ndim))
    ratio = np.std(conditional, axes, keepdims=True, ddof=1) / np.std(guided, axes, keepdims=True, ddof=1)
    return np.asarray(np.float32(share) * (guided * ratio) + np.float32(1 - share) * guided, np.float32)


def text_and_image(scale: float, image_scale: float) -> Combine:
    """Combine [text and image, image, neither]: Brooks et al. 2023 (arXiv 2211.09800), equation 3."""

    def combine(outputs: Sequence[Array]) -> Array:
        both, image, neither = outputs
        guided = neither + np.float32(scale) * (both - image) + np.float32(image_scale) * (image - neither)
        return np.asarray(guided, np.float32)

    return combine


def planned(
    plan: Plan, begin: int, interval: tuple[float, float] | None, every: int | Sequence[int]
) -> list[float | None]:
    """For each evaluation of a run from ``begin`` on: None, every branch is computed; else the conditional one alone.

    Then the number is what the other branches' kept differences from it are multiplied by, 0 where guidance is off.
    It is on where sigma lies in ``interval`` (Kynkaanniemi et al. 2024, arXiv 2404.07724); None is everywhere. There the
    other branches are computed in every n-th evaluation, or in those listed in ``every`` (counted from ``begin``), the
    first guided one included: differences change slowly (Lyu et al. 2024, arXiv 2410.19355, keep them by frequency).
    """
    expected, shares, last = _expected(plan), list[float | None](), None
    for index, sigma in enumerate(plan.input_sigmas[begin:]):
        if interval is not None and not interval[0] <= sigma <= interval[1]:
            shares.append(0.0)
        elif last is None or (index % every == 0 if isinstance(every, int) else index in every):
            shares.append(None)
            last = index
        else:
            shares.append(float(expected[begin + index] / expected[begin + last]) * FADING ** (index - last))
    return shares


def _expected(plan: Plan) -> Array:
    """How large a difference between two branches is at each evaluation beside the others, float32 [n], never rising.

    In noise it is sigma times the gradient of log p(condition | sample) (Ho & Salimans 2022, section 3), which is taken
    to stay. What the model gives in place of noise, the sample being the same, differs by 1 / alpha of that (v, flow) or
    by -sigma / alpha of that (the denoised sample), where alpha is not so small that this would be all.
    """
    alpha, sigma = alpha_sigma(plan.input_sigmas, plan.space == "flow" or bool(plan.config.get("use_flow_sigmas")))
    kind = "flow" if plan.space == "flow" else str(plan.config["prediction_type"]).removeprefix("original_")
    alpha = np.maximum(alpha, LOWEST_ALPHA)
    return np.asarray(sigma / alpha * {"epsilon": alpha, "sample": sigma}.get(kind, np.float32(1)))


def guidance_embedding(weight: float, width: int) -> Array:
    """Float32 [1, width]: the sinusoidal embedding of ``weight`` (guidance_scale - 1) that a distilled model takes.

    Sines, then cosines, of 1000 * weight at ``width // 2`` frequencies from 1 to 1e-4; an odd width ends in 0.
    """
    half = width // 2
    # Rounded as float32 at each step: angles reach thousands, so that a frequency's last bit shows in the sines.
    frequencies = exp32(np.arange(half, dtype=np.float32) * -(log32(10000.0) / np.float32(half - 1)))
    angles = (np.float32(weight) * np.float32(1000.0)) * frequencies
    embedding = np.concatenate([np.sin(angles), np.cos(angles)])
    return np.pad(embedding, (0, width - 2 * half))[None].astype(np.float32)

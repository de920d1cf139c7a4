"""Constructor parameters of the CompVis configurations: which belong to training only, which are unknown."""

from __future__ import annotations

from collections.abc import Mapping

from latentedge.runtime.errors import UsageError

#: Parameters of the YAML files that describe training, logging or devices and do not change the trained network.
TRAINING_ONLY = frozenset(
    {
        "batch_resize_range",
        "ckpt_path",
        "colorize_nlabels",
        "device",
        "ignore_keys",
        "image_key",
        "lossconfig",
        "lr_g_factor",
        "monitor",
        "scheduler_config",
        "use_checkpoint",
        "use_ema",
        "use_fp16",
        "use_bf16",
    }
)


def refuse_unknown(network: str, parameters: Mapping[str, object]) -> None:
    """Raise ``UsageError`` for parameters that are neither a constructor's own nor known as training-only."""
    unknown = sorted(set(parameters) - TRAINING_ONLY)
    if unknown:
        raise UsageError(
            f"{network} does not know the parameter{'s' if len(unknown) > 1 else ''} {', '.join(unknown)}.",
            hint="a parameter that is ignored could change the network: correct its name, or remove it.",
        )


def require_value(network: str, name: str, value: object, *supported: object) -> None:
    """Raise ``UsageError`` unless ``value`` is one of the ``supported`` values of parameter ``name``."""
    if value not in supported:
        expected = ", ".join(repr(one) for one in supported)
        raise UsageError(
            f"{network} has {name}={value!r}, and this implementation builds only {expected}.",
            hint=f"no published model of this family uses another {name}.",
        )

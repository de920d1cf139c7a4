"""latentedge.runtime: draws pictures from a bundle with numpy and one engine library."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from latentedge.runtime.bundle import Bundle
    from latentedge.runtime.errors import LatentEdgeError, UsageError
    from latentedge.runtime.pipeline import Pipeline, Result

__all__ = ["Bundle", "LatentEdgeError", "Pipeline", "Result", "UsageError"]

_HOMES = {
    "Bundle": "latentedge.runtime.bundle",
    "LatentEdgeError": "latentedge.runtime.errors",
    "UsageError": "latentedge.runtime.errors",
    "Pipeline": "latentedge.runtime.pipeline",
    "Result": "latentedge.runtime.pipeline",
}


def __getattr__(name: str) -> Any:
    """Load a public name when it is first used, so that the command line's help starts without numpy."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)

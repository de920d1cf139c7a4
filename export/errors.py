"""Errors of the exporter."""

from __future__ import annotations

from latentedge.runtime.errors import LatentEdgeError


class ExportError(LatentEdgeError):
    """A component could not be turned into a graph that its target takes."""

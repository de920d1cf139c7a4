"""Errors that a user can act on: what is wrong, what was expected and found, and a hint."""

from __future__ import annotations


class LatentEdgeError(Exception):
    """Something failed; the command line prints ``message`` and ``hint`` and exits with ``exit_code``."""

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message}\n\nhint: {self.hint}"


class UsageError(LatentEdgeError):
    """The request itself is wrong: an unknown name, a value out of range, inputs that do not fit the model."""

    exit_code = 2


class MissingDependencyError(LatentEdgeError):
    """A library that this request needs is not installed or cannot be loaded."""


class BundleError(LatentEdgeError):
    """A bundle is damaged, incomplete, or of a version that this runtime does not read."""


class EngineError(LatentEdgeError):
    """An engine library refused a graph, an input, or a device."""


class PrecisionError(EngineError):
    """A device does not compute in the precision of a graph."""


class ParityError(LatentEdgeError):
    """An exported component does not reproduce the original."""


class Interrupted(LatentEdgeError):  # noqa: N818 - not a fault: the user asked for it
    """The user stopped the run (Ctrl-C)."""

    exit_code = 130

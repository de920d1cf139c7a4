"""How far a computed tensor is from its reference, and how far it may be."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from latentedge.runtime.bundle import Array

#: Lowest PSNR in dB at which an exported precision counts as the original.
FLOORS = {"fp32": 80.0, "fp16": 45.0}

#: PSNR given to tensors without any difference.
IDENTICAL_DB = 200.0


@dataclass(frozen=True)
class TensorParity:
    """One output against its reference."""

    #: ``20 log10(peak / rms error)`` in dB, at most 200.
    psnr_db: float
    max_abs_error: float
    #: Largest absolute value of the reference.
    peak: float
    #: Number of computed values that are NaN or infinite.
    not_finite: int = 0

    def worse_of(self, other: TensorParity) -> TensorParity:
        """The lower PSNR, the larger error and peak, and all values that are not finite."""
        return TensorParity(
            min(self.psnr_db, other.psnr_db),
            max(self.max_abs_error, other.max_abs_error),
            max(self.peak, other.peak),
            self.not_finite + other.not_finite,
        )

    def describe(self) -> str:
        """``"43.2 dB PSNR (max abs error 0.0123, peak 1.7)"``, or the number of NaN and infinite values."""
        if self.not_finite:
            return f"{self.not_finite} values that are NaN or infinite"
        return f"{self.psnr_db:.1f} dB PSNR (max abs error {self.max_abs_error:.3g}, peak {self.peak:.3g})"


def compare(reference: Array, computed: Array) -> TensorParity:
    """Compare ``computed`` with a finite ``reference`` of the same shape, in float64.

    A value that is not finite gives -200 dB and an infinite error is written as the largest float32, so that the
    record stays valid JSON.
    """
    if computed.shape != reference.shape:
        raise ValueError(f"shapes differ: {reference.shape}, {computed.shape}")
    peak = float(np.abs(reference).max(initial=0.0))
    not_finite = int(computed.size - np.isfinite(computed).sum())
    if not_finite:
        return TensorParity(-IDENTICAL_DB, float(np.finfo(np.float32).max), peak, not_finite)
    difference = computed.astype(np.float64) - reference.astype(np.float64)
    rms = float(np.sqrt(np.mean(np.square(difference)))) if difference.size else 0.0
    return TensorParity(_psnr(peak, rms), float(np.abs(difference).max(initial=0.0)), peak)


def _psnr(peak: float, rms: float) -> float:
    if rms == 0.0:
        return IDENTICAL_DB
    if peak == 0.0:
        return -IDENTICAL_DB
    return float(np.clip(20.0 * np.log10(peak / rms), -IDENTICAL_DB, IDENTICAL_DB))

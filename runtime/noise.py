"""Streams of N(0, 1) noise by seed: numpy's own, and those of torch's CPU and CUDA generators.

A seed gives the noise that ``torch.randn`` gives with ``torch.Generator(device).manual_seed(seed)``. With one seed a
draw fills the whole batch; with a list of seeds each picture has a stream of its own, so that it does not depend on
its neighbours (as diffusers treats one generator and a list of generators).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from latentedge.runtime.errors import UsageError

Array = npt.NDArray[np.float32]
_TAU = 2 * np.pi


class Draws(Protocol):
    """A source of N(0, 1) draws, taken in order."""

    def normal(self, shape: tuple[int, ...]) -> Array:
        """The next draw, float32 of ``shape``."""


class Recorded:
    """Recorded draws [k, N, ...] in place of a stream's. Samplers use them as they are."""

    recorded = True

    def __init__(self, draws: npt.NDArray[Any]) -> None:
        self._draws = draws
        self._taken = 0

    def normal(self, shape: tuple[int, ...]) -> Array:
        """The next draw, float32 of ``shape``; :class:`UsageError` when they are used up or do not fit."""
        if self._taken >= len(self._draws):
            raise UsageError(f"noise holds {len(self._draws)} draws; this request takes more.")
        draw = np.asarray(self._draws[self._taken], np.float32)
        if draw.shape != shape:
            raise UsageError(f"noise draw {self._taken} must have shape {list(shape)}, found {list(draw.shape)}.")
        self._taken += 1
        return draw


class TorchCpu:
    """torch's CPU generator (MT19937): ATen's ``normal_fill`` from 16 values up, a scalar Box-Muller below."""

    def __init__(self, seed: int) -> None:
        self._words = np.random.RandomState(seed & 0xFFFFFFFF)
        self._waiting: float | None = None  # the second value of a scalar pair, kept between draws

    def integers(self, count: int) -> npt.NDArray[np.uint32]:
        """The generator's next ``count`` 32-bit words."""
        return self._words.randint(0, 1 << 32, count, dtype=np.uint32)

    def draw(self, count: int) -> Array:
        """Float32 [count]."""
        if count < 16:
            return np.array([self._scalar() for _ in range(count)], np.float32)
        uniform = self._uniform(count)
        if rest := count % 16:  # the last 16 values are drawn anew where whole blocks do not fill the array
            uniform = np.concatenate([uniform[: count - rest], self._uniform(16)])
        blocks = uniform.reshape(-1, 2, 8)
        radius = np.sqrt(-2 * np.log(1 - blocks[:, 0]))
        angle = (np.float32(_TAU) * blocks[:, 1].astype(np.float32)).astype(np.float64)  # rounded as torch's is
        values = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).astype(np.float32).ravel()
        return values if not rest else np.concatenate([values[: count - 16], values[-16:]])

    def _uniform(self, count: int) -> npt.NDArray[np.float64]:
        return (self.integers(count) & 0xFFFFFF).astype(np.float64) * 2.0**-24

    def _scalar(self) -> float:
        if (value := self._waiting) is not None:
            self._waiting = None
            return value
        words = self.integers(4).astype(np.uint64)
        first, second = ((words[0::2] << np.uint64(32) | words[1::2]) & np.uint64(2**53 - 1)) * 2.0**-53
        radius = np.sqrt(-2 * np.log1p(-second))
        self._waiting = float(radius * np.sin(_TAU * first))
        return float(radius * np.cos(_TAU * first))


class TorchCuda:
    """torch's CUDA generator: Philox4x32-10 (Salmon et al. 2011), one counter for each GPU thread, and Box-Muller.

    torch starts ``threads`` threads at most (multiprocessors times threads in each) and has each of them fill several
    values of a longer draw, so only draws up to that length are the same on every GPU. None: as on a GPU with a
    thread for each value.
    """

    def __init__(self, seed: int, threads: int | None = None) -> None:
        self._key = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
        self._threads = None if threads is None else threads // 256 * 256
        self._offset = 0

    def draw(self, count: int) -> Array:
        """Float32 [count]."""
        needed = (count + 255) // 256 * 256
        threads = needed if self._threads is None else min(needed, self._threads)
        rounds = -(-count // (threads * 4))
        values = np.empty((rounds, 4, threads), np.float32)
        for i in range(rounds):
            values[i] = self._normals(self._offset + i, threads)
        self._offset += rounds
        return values.reshape(-1)[:count]

    def _normals(self, offset: int, threads: int) -> Array:
        """Float32 [4, threads]: what each thread's ``curand_normal4`` gives at ``offset``."""
        words = self._philox(offset, threads).astype(np.float32).astype(np.float64)
        inverse = float(np.float32(2.0**-32 * _TAU))  # curand's float32 constants, and one rounding of each sum
        uniform = (words[0::2] * 2.0**-32 + 2.0**-33).astype(np.float32).astype(np.float64)
        angle = (words[1::2] * inverse + inverse / 2).astype(np.float32).astype(np.float64)
        radius = np.sqrt(-2 * np.log(uniform))
        pair = np.stack([radius * np.sin(angle), radius * np.cos(angle)], axis=1)
        return pair.astype(np.float32).reshape(4, threads)

    def _philox(self, offset: int, threads: int) -> npt.NDArray[np.uint64]:
        mask = np.uint64(0xFFFFFFFF)
        zero = np.zeros(threads, np.uint64)
        counter = [zero + np.uint64(offset & 0xFFFFFFFF), zero + np.uint64(offset >> 32), np.arange(threads), zero]
        a, b, c, d = (part.astype(np.uint64) for part in counter)
        key = [np.uint64(part) for part in self._key]
        for _ in range(10):
            high, low = np.uint64(0xD2511F53) * a, np.uint64(0xCD9E8D57) * c
            a, b, c, d = (
                (low >> np.uint64(32)) ^ b ^ key[0],
                low & mask,
                (high >> np.uint64(32)) ^ d ^ key[1],
                high & mask,
            )
            key = [np.uint64((int(k) + w) & 0xFFFFFFFF) for k, w in zip(key, (0x9E3779B9, 0xBB67AE85), strict=True)]
        return np.stack([a, b, c, d])


class Numpy:
    """numpy's default generator, drawn in float64 and rounded."""

    def __init__(self, seed: int) -> None:
        self._generator = np.random.default_rng(seed)

    def draw(self, count: int) -> Array:
        """Float32 [count]."""
        return self._generator.standard_normal(count).astype(np.float32)


STREAMS: dict[str, Callable[[int], TorchCpu | TorchCuda | Numpy]] = {
    "numpy": Numpy, "torch": TorchCpu, "cuda": TorchCuda,
}  # fmt: skip


class NoiseStream:
    """The draws of one request: ``kind`` is numpy, torch or cuda; ``seed`` one for the batch or one for each picture."""

    def __init__(self, kind: str, seed: int | Sequence[int], *, threads: int | None = None) -> None:
        if kind not in STREAMS:
            raise UsageError(f"rng {kind!r} is unknown", f"choose from {', '.join(STREAMS)}")
        self._each = not isinstance(seed, (int, np.integer))
        seeds = [int(s) for s in seed] if isinstance(seed, Sequence) else [int(seed)]
        if any(not 0 <= s < 2**64 for s in seeds):
            raise UsageError(f"a seed must be from 0 to 2**64 - 1, found {seed}")
        make = (lambda s: TorchCuda(s, threads)) if kind == "cuda" else STREAMS[kind]
        self._streams = [make(s) for s in seeds]

    @property
    def shared(self) -> bool:
        """Whether one stream fills the whole batch."""
        return not self._each

    def normal(self, shape: tuple[int, ...]) -> Array:
        """The next draw, float32 of ``shape`` [N, ...]; N must be the number of seeds where a list was given."""
        if not self._each:
            return self._streams[0].draw(int(np.prod(shape))).reshape(shape)
        if shape[0] != len(self._streams):
            raise UsageError(f"{len(self._streams)} seeds were given for {shape[0]} pictures", "give one seed for each")
        size = int(np.prod(shape[1:]))
        return np.stack([stream.draw(size).reshape(shape[1:]) for stream in self._streams])

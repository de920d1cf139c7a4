"""Noise streams against torch and against published values of its CUDA generator."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latentedge.runtime.errors import UsageError
from latentedge.runtime.noise import NoiseStream, TorchCpu, TorchCuda

# torch 2.13.0: torch.randn(..., generator=torch.Generator().manual_seed(42)): four values, then sixteen, of one stream
TORCH_SEED_42 = [0.33669036626815796, 0.12880940735340118, 0.23446236550807953, 0.23033303022384644]
# stable-diffusion-webui's record of torch.cuda.manual_seed(0); torch.randn((3, 4), device="cuda")
CUDA_SEED_0 = [
    [-0.92466259, -0.42534415, -2.6438457, 0.14518388],
    [-0.12086647, -0.57972564, -0.62285122, -0.32838709],
    [-1.07454231, -0.36314407, -1.67105067, 2.26550497],
]


def test_the_first_values_of_torchs_cpu_stream() -> None:
    np.testing.assert_allclose(NoiseStream("torch", 42).normal((4,)), TORCH_SEED_42, atol=5e-7)


@given(
    seed=st.integers(0, 2**64 - 1),
    shapes=st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=4), min_size=1, max_size=6),
)
@settings(max_examples=60, deadline=None)
def test_torchs_cpu_stream_in_every_length_and_order(seed: int, shapes: list[list[int]]) -> None:
    torch = pytest.importorskip("torch")
    stream, generator = NoiseStream("torch", seed), torch.Generator().manual_seed(seed)
    for shape in shapes:
        expected = torch.randn(shape, generator=generator).numpy()
        np.testing.assert_allclose(stream.normal(tuple(shape)), expected, atol=2e-6, rtol=0)


def test_the_words_of_torchs_cpu_stream_are_equal_to_the_bit() -> None:
    torch = pytest.importorskip("torch")
    expected = torch.empty(1000, dtype=torch.int64).random_(0, 2**32, generator=torch.Generator().manual_seed(123))
    wide = TorchCpu(123).integers(2000).astype(np.uint64)  # a range of 2**32 takes two words for each value
    np.testing.assert_array_equal(
        (wide[0::2] << np.uint64(32) | wide[1::2]) % 2**32, expected.numpy().astype(np.uint64)
    )
    ints = torch.empty(1000, dtype=torch.int32).random_(0, 2**20, generator=torch.Generator().manual_seed(123))
    np.testing.assert_array_equal(TorchCpu(123).integers(1000) % 2**20, ints.numpy())


def test_torchs_cuda_stream_has_the_published_values() -> None:
    np.testing.assert_allclose(NoiseStream("cuda", 0).normal((3, 4)), CUDA_SEED_0, atol=1e-6)


def test_philox_has_the_published_words() -> None:
    """Known answers of Random123 for philox4x32-10: all zeros, and the key and counter of ones."""
    zero = TorchCuda(0)._philox(0, 1)[:, 0]
    assert [f"{int(word):08x}" for word in zero] == ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]


def test_the_cuda_stream_moves_on_with_each_draw_and_has_a_counter_for_each_value() -> None:
    stream = NoiseStream("cuda", 7)
    first, second = stream.normal((1, 4, 8, 8)), stream.normal((1, 4, 8, 8))
    again = NoiseStream("cuda", 7).normal((2, 4, 8, 8))
    assert np.abs(first - second).max() > 0.5
    np.testing.assert_array_equal(again[:1], first)  # a longer draw begins as a shorter one
    assert np.abs(again[1:] - second).max() > 0.5


def test_a_gpu_with_few_threads_fills_long_draws_in_rounds() -> None:
    """256 threads, 2048 values: two rounds, each of four values a thread."""
    whole = NoiseStream("cuda", 3, threads=256).normal((2048,))
    plain = TorchCuda(3)
    for i in range(2):
        np.testing.assert_array_equal(whole[i * 1024 : (i + 1) * 1024], plain._normals(i, 256).ravel())
    np.testing.assert_array_equal(NoiseStream("cuda", 3).normal((200,)), whole[:200])
    assert not np.array_equal(NoiseStream("cuda", 3).normal((2048,))[256:], whole[256:])


@pytest.mark.parametrize("kind", ["numpy", "torch", "cuda"])
def test_the_values_are_normal(kind: str) -> None:
    values = NoiseStream(kind, 11).normal((200_000,)).astype(np.float64)
    moments = [values.mean(), values.var(), (values**3).mean(), (values**4).mean()]
    np.testing.assert_allclose(moments, [0, 1, 0, 3], atol=0.1)
    assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 0.01


@pytest.mark.parametrize("kind", ["numpy", "torch", "cuda"])
def test_a_seed_for_each_picture_makes_it_independent_of_its_neighbours(kind: str) -> None:
    both = NoiseStream(kind, [3, 4]).normal((2, 4, 8, 8))
    for seed, found in zip((3, 4), both, strict=True):
        np.testing.assert_array_equal(NoiseStream(kind, seed).normal((1, 4, 8, 8))[0], found)


def test_numpys_stream_is_its_default_generator() -> None:
    expected = np.random.default_rng(5).standard_normal((2, 3)).astype(np.float32)
    np.testing.assert_array_equal(NoiseStream("numpy", 5).normal((2, 3)), expected, strict=True)


@pytest.mark.parametrize(
    ("arguments", "shape", "words"),
    [(("odd", 1), (1,), "odd"), (("torch", -1), (1,), "-1"), (("torch", [1, 2]), (3, 1), "2 seeds")],
)
def test_what_is_refused(arguments: tuple[str, Any], shape: tuple[int, ...], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        NoiseStream(*arguments).normal(shape)


def test_the_counter_of_the_cuda_stream_has_64_bits() -> None:
    first, later = TorchCuda(3), TorchCuda(3)
    later._offset = 1 << 32
    assert np.abs(first.draw(8) - later.draw(8)).max() > 0.1

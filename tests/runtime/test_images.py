"""Pictures in and out: ranges, rounding, resizing, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from latentedge.runtime.errors import UsageError
from latentedge.runtime.images import labels_from, masks_from, pictures_from, resize_nearest, resize_pictures, to_bytes


def test_bytes_are_truncated_as_compvis_does_or_rounded_half_to_even_as_diffusers_does() -> None:
    levels = np.array([-0.5, 0.5, 1.5, 2.5, 2.9, 254.9, 255.0, 300.0]) / 255
    assert to_bytes(levels.astype(np.float64), truncate=False).tolist() == [0, 0, 2, 2, 3, 255, 255, 255]
    assert to_bytes(levels.astype(np.float64), truncate=True).tolist() == [0, 0, 1, 2, 2, 254, 255, 255]


def test_a_picture_is_the_same_from_a_file_a_pil_image_and_an_array(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    expected = (pixels / 255).astype(np.float32)[None]
    for value in (tmp_path / "a.png", str(tmp_path / "a.png"), Image.fromarray(pixels), pixels, expected):
        found = pictures_from(value)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, atol=1e-7)
    assert pictures_from([pixels, expected]).shape == (2, 5, 7, 3)


def test_a_mask_is_grey_and_has_no_channels() -> None:
    assert masks_from(Image.new("RGB", (4, 3), "white")).tolist() == np.ones((1, 3, 4)).tolist()
    assert masks_from(np.zeros((2, 3, 4), np.uint8)).shape == (2, 3, 4)
    with pytest.raises(UsageError, match=r"mask: expected \[N, H, W\]"):
        masks_from(np.zeros((1, 2, 3, 4), np.uint8))


def test_nearest_takes_the_row_below_the_ratio() -> None:
    rows = np.arange(5.0)[:, None].repeat(5, 1)
    assert resize_nearest(rows, 3, 5)[:, 0].tolist() == [0, 1, 3]
    assert resize_nearest(rows, 8, 5)[:, 0].tolist() == [0, 0, 1, 1, 2, 3, 3, 4]
    assert resize_nearest(rows.T, 5, 3)[0].tolist() == [0, 1, 3]


def test_resizing_leaves_a_fitting_picture_alone_and_keeps_a_flat_one_flat() -> None:
    picture = np.random.default_rng(1).random((2, 6, 4, 3)).astype(np.float32)
    assert resize_pictures(picture, 6, 4) is picture
    flat = resize_pictures(np.full((1, 6, 4, 3), 0.2, np.float32), 12, 10)
    assert flat.shape == (1, 12, 10, 3)
    np.testing.assert_allclose(flat, 51 / 255, atol=1e-7)


def test_labels_are_the_palette_numbers_of_a_picture(tmp_path: Path) -> None:
    labels = np.array([[0, 1, 2], [2, 1, 0]], np.uint8)
    image = Image.fromarray(labels).convert("P")
    image.putdata(labels.ravel().tolist())
    image.save(tmp_path / "labels.png")
    assert labels_from(tmp_path / "labels.png", 3).tolist() == [labels.tolist()]
    with pytest.raises(UsageError, match="one channel, found RGB"):
        labels_from(image.convert("RGB"), 3)
    with pytest.raises(UsageError, match="labels go from 0 to 1, found 0 to 2"):
        labels_from(labels, 2)
    with pytest.raises(UsageError, match="expected integer labels"):
        labels_from(labels / 2, 3)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.full((2, 2, 3), 1.5), "must lie in 0..1"),
        (np.full((2, 2, 3), -0.1), "must lie in 0..1"),
        (np.full((2, 2, 3), np.nan), "must lie in 0..1"),
        (np.zeros((2, 2, 3), np.int64), "expected uint8, or float"),
        (np.zeros((2, 2), np.uint8), r"expected \[N, H, W, 3\]"),
        ("absent.png", "there is no picture"),
    ],
)
def test_what_is_no_picture_is_refused(value: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        pictures_from(value)


def test_a_file_that_is_no_picture_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"not a picture")
    with pytest.raises(UsageError, match="cannot be read as a picture"):
        pictures_from(tmp_path / "a.png")

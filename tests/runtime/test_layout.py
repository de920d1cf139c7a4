"""Boxes to tokens, against the coding written out by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from latentedge.runtime.bundle import Layout
from latentedge.runtime.errors import UsageError
from latentedge.runtime.layout import read_layouts, tokens_from_layout

#: A grid of 4 x 4 points, two objects, the crop at the end.
LAYOUT = Layout(length=8, max_objects=2, tokens=16, none_token=15, crop=True, classes=3)
OBJECT = {"category": 1, "box": [0, 1 / 3, 2 / 3, 1]}


def test_an_object_is_its_class_and_two_corners_row_by_row() -> None:
    assert tokens_from_layout([OBJECT], LAYOUT).tolist() == [[1, 4, 14, 15, 15, 15, 0, 15]]
    both = tokens_from_layout([OBJECT, {"category": 2, "box": [1 / 3, 0, 1, 2 / 3]}], LAYOUT)
    assert both.tolist() == [[1, 4, 14, 2, 1, 11, 0, 15]]
    assert str(both.dtype) == "int64"


def test_without_a_crop_the_row_ends_with_the_objects() -> None:
    plain = Layout(length=6, max_objects=2, tokens=16, none_token=15, crop=False, classes=3)
    assert tokens_from_layout([OBJECT], plain).tolist() == [[1, 4, 14, 15, 15, 15]]


def test_points_between_two_are_rounded_half_to_even() -> None:
    """(1/6, 1/2) lies at 0.5 and 1.5 of the grid: column 0, row 2."""
    corners = tokens_from_layout([{"category": 0, "box": [1 / 6, 1 / 2, 1, 1]}], LAYOUT)
    assert corners[0, 1] == 2 * 4 + 0


def test_a_corner_that_rounding_moved_past_the_border_is_at_the_border() -> None:
    moved = {"category": 1, "box": [-1e-12, 1 / 3, 2 / 3, 0.7 + 0.2 + 0.1 + 1e-12]}
    assert moved["box"][3] > 1
    assert (tokens_from_layout([moved], LAYOUT) == tokens_from_layout([OBJECT], LAYOUT)).all()
    with pytest.raises(UsageError, match="not inside the picture"):
        tokens_from_layout([{"category": 1, "box": [0, 0, 1.001, 1]}], LAYOUT)


@pytest.mark.parametrize(
    ("modifiers", "units"),
    [
        ({"group_of": True}, 1),
        ({"occluded": True}, 2),
        ({"depiction": True}, 4),
        ({"inside": True}, 8),
        ({"group_of": True, "inside": True, "occluded": False}, 9),
    ],
)
def test_modifiers_add_multiples_of_the_number_of_classes(modifiers: dict[str, bool], units: int) -> None:
    layout = Layout(length=8, max_objects=2, tokens=64, none_token=63, crop=True, classes=3)
    assert tokens_from_layout([{**OBJECT, **modifiers}], layout)[0, 0] == 1 + 3 * units


@pytest.mark.parametrize(
    ("objects", "message"),
    [
        ([OBJECT] * 3, "at most 2 objects, found 3"),
        ([{**OBJECT, "category": 3}], "from 0 to 2, found 3"),
        ([{**OBJECT, "category": -1}], "class number from 0, found -1"),
        ([{**OBJECT, "category": True}], "class number from 0, found True"),
        ([OBJECT, {**OBJECT, "box": [0, 0, 1.1, 1]}], "object 1: the box .* is not inside the picture"),
        ([{**OBJECT, "box": [0.5, 0, 0.5, 1]}], "is not inside the picture"),
        ([{**OBJECT, "inside": True}], "go from 0 to 14, found 25"),
    ],
)
def test_an_object_that_does_not_fit_is_named(objects: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        tokens_from_layout(objects, LAYOUT)


def test_modifiers_need_the_number_of_classes() -> None:
    unknown = Layout(length=8, max_objects=2, tokens=16, none_token=15, crop=True)
    assert tokens_from_layout([{**OBJECT, "category": 9}], unknown)[0, 0] == 9
    with pytest.raises(UsageError, match="occluded cannot be coded"):
        tokens_from_layout([{**OBJECT, "occluded": True}], unknown)


def test_a_layout_comes_from_a_file_or_a_list(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps([OBJECT]))
    (tmp_path / "b.json").write_text(json.dumps({"objects": [OBJECT]}))
    (tmp_path / "c.json").write_text("[")
    for value in (tmp_path / "a.json", str(tmp_path / "b.json"), [OBJECT], (OBJECT,), {"objects": [OBJECT]}):
        assert read_layouts(value) == [[OBJECT]]
    assert read_layouts([]) == [[]]
    assert read_layouts([[OBJECT], []]) == [[OBJECT], []]
    for value, message in ((tmp_path / "c.json", "cannot be read"), ({"boxes": []}, "a list of objects")):
        with pytest.raises(UsageError, match=message):
            read_layouts(value)

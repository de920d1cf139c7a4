"""Boxes to tokens, for layout-to-image models.

The coding is that of taming-transformers' ``ObjectsBoundingBoxConditionalBuilder``: each object is a class token and
the tokens of two corners on a square grid; a padding triple fills up; the crop's corners come last.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from latentedge.runtime.bundle import Array, Layout
from latentedge.runtime.errors import UsageError

#: Bits of the class token's modifier, in units of the number of classes.
MODIFIERS = {"group_of": 1, "occluded": 2, "depiction": 4, "inside": 8}
WHOLE_PICTURE = (0.0, 0.0, 1.0, 1.0)
EXAMPLE = 'for example [{"category": 3, "box": [0.1, 0.2, 0.5, 0.9]}], boxes as x0, y0, x1, y1 in 0..1'


def read_layout(value: Any) -> list[dict[str, Any]]:
    """Objects of a layout from a JSON file's path, or from the list itself."""
    if isinstance(value, (str, Path)):
        try:
            value = json.loads(Path(value).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise UsageError(f"the layout {value} cannot be read: {error}.", hint=EXAMPLE) from error
    if isinstance(value, Mapping):
        value = value.get("objects")
    if not isinstance(value, list) or not all(isinstance(item, Mapping) for item in value):
        raise UsageError(
            "a layout is a list of objects.",
            hint=EXAMPLE,
        )
    return [dict(item) for item in value]


def tokens_from_layout(objects: Sequence[Mapping[str, Any]], layout: Layout) -> Array:
    """Token ids, int64 ``[1, layout.length]``; :class:`UsageError` names an object that does not fit."""
    if len(objects) > layout.max_objects:
        raise UsageError(f"a layout holds at most {layout.max_objects} objects, found {len(objects)}.")
    sections = int(layout.tokens**0.5)
    tokens: list[int] = []
    for number, item in enumerate(objects):
        x0, y0, x1, y1 = _box(item, number)
        tokens += [_class_token(item, number, layout), _point(x0, y0, sections), _point(x1, y1, sections)]
    tokens += [layout.none_token] * (3 * (layout.max_objects - len(objects)))
    if layout.crop:
        x0, y0, x1, y1 = WHOLE_PICTURE
        tokens += [_point(x0, y0, sections), _point(x1, y1, sections)]
    return np.array([tokens], np.int64)


def _point(x: float, y: float, sections: int) -> int:
    # Python's round() is half to even, as the original's.
    return round(y * (sections - 1)) * sections + round(x * (sections - 1))


def _box(item: Mapping[str, Any], number: int) -> tuple[float, float, float, float]:
    box = item.get("box")
    if not isinstance(box, (list, tuple)) or len(box) != 4 or not all(isinstance(side, (int, float)) for side in box):
        raise UsageError(f"layout object {number}: 'box' must be x0, y0, x1, y1, found {box!r}.")
    x0, y0, x1, y1 = (float(side) for side in box)
    if not (0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1):
        raise UsageError(
            f"layout object {number}: the box {list(box)} is not inside the picture.",
            hint="boxes are x0, y0, x1, y1 as fractions of the picture: 0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1",
        )
    return x0, y0, x1, y1


def _class_token(item: Mapping[str, Any], number: int, layout: Layout) -> int:
    category = item.get("category")
    modifiers = [name for name in MODIFIERS if item.get(name)]
    if not isinstance(category, int) or isinstance(category, bool) or category < 0:
        raise UsageError(f"layout object {number}: 'category' must be a class number from 0, found {category!r}.")
    if modifiers and layout.classes is None:
        raise UsageError(
            f"layout object {number}: {', '.join(modifiers)} cannot be coded, this bundle does not know its class count."
        )
    if layout.classes is not None and category >= layout.classes:
        raise UsageError(f"layout object {number}: categories go from 0 to {layout.classes - 1}, found {category}.")
    token = category + (layout.classes or 0) * sum(MODIFIERS[name] for name in modifiers)
    if token >= layout.none_token:
        raise UsageError(
            f"layout object {number}: class numbers of this model go from 0 to {layout.none_token - 1}, found {token}.",
            hint="a category counts the data set's classes from 0, plus the number of classes for each modifier",
        )
    return token

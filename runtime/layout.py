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

#: How far a corner may lie outside of the picture: what adding a width to a position rounds.
ROUNDED = 1e-6
#: Bits of the class token's modifier, in units of the number of classes.
MODIFIERS = {"group_of": 1, "occluded": 2, "depiction": 4, "inside": 8}
WHOLE_PICTURE = (0.0, 0.0, 1.0, 1.0)
EXAMPLE = 'for example [{"category": 3, "box": [0.1, 0.2, 0.5, 0.9]}], boxes as x0, y0, x1, y1 in 0..1'


def read_layouts(value: Any) -> list[list[dict[str, Any]]]:
    """Layouts from a JSON file's path or from the data itself: one, or a list of them, one for each picture."""
    if isinstance(value, (str, Path)):
        try:
            value = json.loads(Path(value).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise UsageError(f"the layout {value} cannot be read: {error}.", hint=EXAMPLE) from error
    several = isinstance(value, (list, tuple)) and value and all(isinstance(item, (list, tuple)) for item in value)
    return [_read_layout(item) for item in (value if several else [value])]


def _read_layout(value: Any) -> list[dict[str, Any]]:
    if isinstance(value, Mapping):
        value = value.get("objects")
    if not isinstance(value, (list, tuple)) or not all(isinstance(item, Mapping) for item in value):
        raise UsageError("a layout is a list of objects.", hint=EXAMPLE)
    return [dict(item) for item in value]


def tokens_from_layout(objects: Sequence[Mapping[str, Any]], layout: Layout) -> Array:
    """Token ids, int64 ``[1, layout.length]``; :class:`UsageError` names an object that does not fit."""
    if len(objects) > layout.max_objects:
        raise UsageError(
            f"a layout holds at most {layout.max_objects} objects, found {len(objects)}.",
            hint="the model was trained on so many: leave the smallest ones out",
        )
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
        raise UsageError(f"layout object {number}: 'box' must be x0, y0, x1, y1, found {box!r}.", hint=EXAMPLE)
    x0, y0, x1, y1 = (_inside(float(side)) for side in box)
    if not (0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1):
        raise UsageError(
            f"layout object {number}: the box {list(box)} is not inside the picture.",
            hint="boxes are x0, y0, x1, y1 as fractions of the picture: 0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1",
        )
    return x0, y0, x1, y1


def _inside(side: float) -> float:
    """0 or 1 for what rounding moved past it."""
    return min(max(side, 0.0), 1.0) if -ROUNDED <= side <= 1 + ROUNDED else side


def _class_token(item: Mapping[str, Any], number: int, layout: Layout) -> int:
    category = item.get("category")
    modifiers = [name for name in MODIFIERS if item.get(name)]
    if not isinstance(category, int) or isinstance(category, bool) or category < 0:
        raise UsageError(
            f"layout object {number}: 'category' must be a class number from 0, found {category!r}.", hint=EXAMPLE
        )
    if modifiers and layout.classes is None:
        raise UsageError(
            f"layout object {number}: {', '.join(modifiers)} cannot be coded, this bundle does not know its class count.",
            hint="export again with `latentedge: {layout_classes: NUMBER}` in the YAML, or leave the word out",
        )
    if layout.classes is not None and category >= layout.classes:
        raise UsageError(
            f"layout object {number}: categories go from 0 to {layout.classes - 1}, found {category}.",
            hint="a category is the number of a class in the data that the model was trained on, counted from 0",
        )
    token = category + (layout.classes or 0) * sum(MODIFIERS[name] for name in modifiers)
    if token >= layout.none_token:
        raise UsageError(
            f"layout object {number}: class numbers of this model go from 0 to {layout.none_token - 1}, found {token}.",
            hint="a category counts the data set's classes from 0, plus the number of classes for each modifier",
        )
    return token

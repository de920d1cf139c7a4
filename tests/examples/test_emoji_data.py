"""Data recipe of the embedded default model, without its packages."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from examples.emoji.captions import BACKGROUNDS, STYLES
from examples.emoji.data import SIZE, background_colours, compose, emoji, held_out, render

SQUARE = '<path fill="#ff0000" d="M0 0h32v32H0z"/>'


def test_compose_is_exact_where_alpha_is_full_or_empty() -> None:
    picture = np.zeros((2, SIZE, SIZE, 4), np.uint8)
    picture[0, :, :32] = (10, 200, 30, 255)
    composed = compose(picture, np.array([[1, 2, 3], [250, 251, 252]], np.uint8))
    assert (composed[0, :, :32] == (10, 200, 30)).all()
    assert (composed[0, :, 32:] == (1, 2, 3)).all()
    assert (composed[1] == (250, 251, 252)).all()


def test_compose_broadcasts_backgrounds() -> None:
    picture = np.full((3, 1, SIZE, SIZE, 4), 128, np.uint8)
    assert compose(picture, background_colours()[None]).shape == (3, len(BACKGROUNDS), SIZE, SIZE, 3)


def test_held_out_is_small_fixed_and_leaves_every_picture_somewhere() -> None:
    chosen = held_out(301)
    assert chosen.shape == (301, len(STYLES), len(BACKGROUNDS))
    assert (chosen == held_out(301)).all()
    assert 0.03 < chosen.mean() < 0.07
    assert not chosen.all(axis=2).any()


def _package(folder: Path, names: dict[str, str]) -> None:
    folder.mkdir(parents=True)
    icons = {"width": 32, "height": 32, "icons": {name: {"body": SQUARE} for name in names.values()}}
    (folder / "icons.json").write_text(json.dumps(icons), encoding="utf-8")
    (folder / "chars.json").write_text(json.dumps(names), encoding="utf-8")


@pytest.fixture
def modules(tmp_path: Path) -> Path:
    """A small copy of the packages: a heart, a keycap, a flag, and a star that one style lacks."""
    _package(
        tmp_path / "@iconify-json/fluent-emoji-flat", {"2764": "red-heart", "31-20e3": "keycap-1", "1f3c1": "flag"}
    )
    _package(
        tmp_path / "@iconify-json/noto",
        {"2764-fe0f": "red-heart", "31-20e3": "keycap-1", "1f3c1": "flag", "2b50": "star"},
    )
    assets = tmp_path / "@lobehub/fluent-emoji-3d/assets"
    assets.mkdir(parents=True)
    for code in ("2764-fe0f", "0031-20e3", "31-20e3", "1f3c1", "2b50"):
        Image.new("RGBA", (256, 256), (0, 0, 255, 255)).save(assets / f"{code}.webp", lossless=True)
    data = tmp_path / "emojibase-data/en"
    data.mkdir(parents=True)
    entries = [
        {"label": "red heart", "hexcode": "2764-FE0F", "group": 0, "subgroup": 14},
        {"label": "keycap: 1", "hexcode": "31-20E3", "group": 8, "subgroup": 94},
        {"label": "chequered flag", "hexcode": "1F3C1", "group": 9, "subgroup": 97},
        {"label": "star", "hexcode": "2B50", "group": 5, "subgroup": 59},
        {"label": "regional indicator A", "hexcode": "1F1E6"},
    ]
    (data / "data.json").write_text(json.dumps(entries), encoding="utf-8")
    return tmp_path


def test_only_emoji_of_every_style_that_are_no_flags_and_keycaps(modules: Path) -> None:
    found = dict(emoji(modules))
    assert list(found) == ["red heart"]
    assert set(found["red heart"]) == set(STYLES)


def test_rendered_size_margin_and_colour(modules: Path) -> None:
    pytest.importorskip("resvg_py")
    sources = dict(emoji(modules))["red heart"]
    for style, colour in (("flat", (255, 0, 0)), ("3d", (0, 0, 255))):
        drawn = render(sources[style])
        assert drawn.shape == (SIZE, SIZE, 4)
        assert drawn.dtype == np.uint8
        assert (drawn[:2, :, 3] == 0).all()
        assert (drawn[2:-2, 2:-2, 3] == 255).all()
        assert tuple(drawn[SIZE // 2, SIZE // 2, :3]) == colour

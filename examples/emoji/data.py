"""The data recipe: fetch the npm packages, render every emoji at 64x64, compose on named backgrounds.

``python -m examples.emoji.data FOLDER`` writes FOLDER/pictures.npz: ``pictures`` uint8 [N, 64, 64, 4] (straight alpha),
``concept`` and ``style`` int64 [N], ``labels`` [concepts]. Nothing that it fetches or draws is committed.

Kept: emoji without skin tone, in all three styles. Left out: flags, keycaps, regional indicators (Microsoft published
none), and Lobehub pictures whose codepoint is not in the Fluent flat set.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from PIL import Image
from rich.progress import track

from examples.emoji.captions import BACKGROUNDS, STYLES

PACKAGES = {
    "@iconify-json/fluent-emoji-flat": "1.2.6",
    "@lobehub/fluent-emoji-3d": "1.1.0",
    "@iconify-json/noto": "1.2.9",
    "emojibase-data": "17.0.0",
}
SIZE = 64
# Rendered at 120 pixels inside 128, then halved: a margin of two pixels, and smooth edges.
RENDERED, CANVAS = 120, 128
GROUP_COMPONENT, GROUP_FLAGS = 2, 9
SUBGROUP_KEYCAP = 94


@dataclass(frozen=True)
class Pictures:
    """All rendered emoji: ``pictures`` uint8 [N, 64, 64, 4], ``concept`` and ``style`` int64 [N], ``labels``."""

    pictures: np.ndarray
    concept: np.ndarray
    style: np.ndarray
    labels: list[str]

    @staticmethod
    def load(folder: Path) -> Pictures:
        """Read what ``main`` wrote into ``folder``."""
        with np.load(folder / "pictures.npz") as arrays:
            return Pictures(
                arrays["pictures"], arrays["concept"], arrays["style"], [str(label) for label in arrays["labels"]]
            )


def fetch(folder: Path) -> Path:
    """Install the packages with npm (no scripts are run); returns their folder."""
    folder.mkdir(parents=True, exist_ok=True)
    wanted = [f"{name}@{version}" for name, version in PACKAGES.items()]
    command = ["npm", "install", "--prefix", str(folder), "--no-audit", "--no-fund", "--ignore-scripts", *wanted]
    subprocess.run(command, check=True)
    return folder / "node_modules"


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _codepoints(text: str) -> str:
    """Lower-case codepoints without the variation selector, which the packages write or leave out at will."""
    return text.lower().replace("-fe0f", "")


def _icon_set(package: Path) -> tuple[dict[str, str], dict[str, str], float]:
    """An iconify package's icon names by codepoint, SVG bodies by name, and view box size."""
    icons = _read(package / "icons.json")
    bodies = {name: icon["body"] for name, icon in icons["icons"].items()}
    for name, alias in icons.get("aliases", {}).items():
        if set(alias) == {"parent"} and alias["parent"] in bodies:
            bodies[name] = bodies[alias["parent"]]
    names = {_codepoints(key): name for key, name in _read(package / "chars.json").items()}
    return names, bodies, float(icons["width"])


def emoji(modules: Path) -> Iterator[tuple[str, dict[str, str | Path]]]:
    """Label and sources by style (SVG text, or a WebP's path) of each emoji that all styles have."""
    flat_names, flat_bodies, flat_size = _icon_set(modules / "@iconify-json/fluent-emoji-flat")
    noto_names, noto_bodies, noto_size = _icon_set(modules / "@iconify-json/noto")
    assets = (modules / "@lobehub/fluent-emoji-3d/assets").iterdir()
    lobehub = {_codepoints(path.stem): path for path in assets if path.suffix == ".webp"}
    for entry in _read(modules / "emojibase-data/en/data.json"):
        code = _codepoints(entry["hexcode"])
        if entry.get("group", GROUP_FLAGS) in (GROUP_COMPONENT, GROUP_FLAGS) or entry["subgroup"] == SUBGROUP_KEYCAP:
            continue
        flat, noto = flat_bodies.get(flat_names.get(code, "")), noto_bodies.get(noto_names.get(code, ""))
        if flat and noto and code in lobehub:
            yield entry["label"], {"flat": _svg(flat, flat_size), "3d": lobehub[code], "noto": _svg(noto, noto_size)}


def _svg(body: str, size: float) -> str:
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="0 0 {size:g} {size:g}" width="{size:g}" height="{size:g}">{body}</svg>'
    )


def render(source: str | Path) -> np.ndarray:
    """One emoji as uint8 [64, 64, 4], straight alpha."""
    if isinstance(source, Path):
        picture = Image.open(source).convert("RGBa").resize((RENDERED, RENDERED), Image.Resampling.BOX)
    else:
        import io

        import resvg_py

        drawn = bytes(resvg_py.svg_to_bytes(svg_string=source, width=RENDERED, height=RENDERED))
        picture = Image.open(io.BytesIO(drawn)).convert("RGBa")
    canvas = Image.new("RGBa", (CANVAS, CANVAS))
    canvas.paste(picture, ((CANVAS - RENDERED) // 2,) * 2)
    return np.asarray(canvas.reduce(CANVAS // SIZE).convert("RGBA"))


def compose(pictures: np.ndarray, colour: np.ndarray) -> np.ndarray:
    """uint8 [..., 64, 64, 4] over ``colour`` [..., 3] (0..255): uint8 [..., 64, 64, 3]."""
    alpha = pictures[..., 3:].astype(np.float32) / 255
    behind = np.asarray(colour, dtype=np.float32)[..., None, None, :]
    return np.rint(pictures[..., :3] * alpha + behind * (1 - alpha)).astype(np.uint8)


def background_colours() -> np.ndarray:
    """The named backgrounds in order, uint8 [backgrounds, 3]."""
    return np.array(list(BACKGROUNDS.values()), dtype=np.uint8)


def held_out(concepts: int, share: float = 0.05, seed: int = 20) -> np.ndarray:
    """The combinations that the denoiser never sees, bool [concepts, styles, backgrounds]."""
    return np.random.default_rng(seed).random((concepts, len(STYLES), len(BACKGROUNDS))) < share


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
def main(folder: Path) -> None:
    """Fetch the packages into FOLDER and write FOLDER/pictures.npz."""
    modules = folder / "node_modules"
    if not modules.exists():
        modules = fetch(folder)
    pictures, concept, style, labels = [], [], [], []
    for index, (label, sources) in enumerate(track(list(emoji(modules)), "rendering")):
        labels.append(label)
        for number, name in enumerate(STYLES):
            pictures.append(render(sources[name]))
            concept.append(index)
            style.append(number)
    np.savez_compressed(
        folder / "pictures.npz",
        pictures=np.stack(pictures),
        concept=np.array(concept),
        style=np.array(style),
        labels=np.array(labels),
    )
    click.echo(f"{len(labels)} concepts, {len(pictures)} pictures: {folder / 'pictures.npz'}")


if __name__ == "__main__":
    main()

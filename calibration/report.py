"""Writes a comparison as JSON, as a PNG of pictures side by side, and as one HTML page that needs nothing else."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from latentedge.calibration import html
from latentedge.calibration.compare import Comparison, caption
from latentedge.calibration.pictures import Difference
from latentedge.calibration.plan import write_atomically
from latentedge.runtime.bundle import Array
from latentedge.runtime.images import to_bytes

#: Rows of the picture grid.
MOST_ROWS = 12
MARGIN, LABEL = 8, 16
#: Pictures narrower than this are enlarged.
SHOWN_WIDTH = 200
#: The difference is drawn this many times as strong.
AMPLIFIED = 8
#: A distance to the reference pictures that has grown by more than this is marked.
WORSE_PERCENT = 5.0


def write_report(comparison: Comparison, folder: Path) -> dict[str, Path]:
    """Write ``comparison.json``, ``.png`` and ``.html`` into ``folder``; gives their paths."""
    files = {kind: folder / f"comparison.{kind}" for kind in ("json", "png", "html")}
    write_atomically(files["json"], (json.dumps(comparison.to_json(), indent=2) + "\n").encode())
    write_atomically(files["png"], html.png(grid(comparison)))
    write_atomically(files["html"], page(comparison).encode())
    return files


def grid(comparison: Comparison) -> Image.Image:
    """Both pictures and their amplified difference, worst first."""
    shown = comparison.ranked()[:MOST_ROWS]
    height, width = comparison.first.pictures.shape[1:3]
    factor = max(1, SHOWN_WIDTH // width)
    height, width = height * factor, width * factor
    row = height + LABEL + MARGIN
    sheet = Image.new("RGB", (3 * (width + MARGIN) + MARGIN, MARGIN + LABEL + row * len(shown)), "white")
    pen = ImageDraw.Draw(sheet)
    for column, label in enumerate((*comparison.labels, f"difference x {AMPLIFIED}")):
        pen.text((MARGIN + column * (width + MARGIN), MARGIN // 2), _fitting(label, width), fill="black")
    for index, entry in enumerate(shown):
        top = MARGIN + LABEL + index * row
        text = f"{entry.psnr_db:.1f} dB  {caption(comparison.requests[entry.index])}"
        pen.text((MARGIN, top), _fitting(text, 3 * width), fill="black")
        for column, picture in enumerate(_triple(comparison, entry.index)):
            enlarged = Image.fromarray(picture).resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(enlarged, (MARGIN + column * (width + MARGIN), top + LABEL))
    return sheet


def _fitting(text: str, width: int) -> str:
    most = max(4, width // 6)
    return text if len(text) <= most else text[: most - 1] + "…"


def _triple(comparison: Comparison, index: int) -> list[Array]:
    one, two = comparison.first.pictures[index], comparison.second.pictures[index]
    difference = np.clip(np.abs(one - two) * AMPLIFIED, 0, 1)
    return list(to_bytes(np.stack([one, two, difference]), truncate=False))


def page(comparison: Comparison) -> str:
    """One HTML page: the figures, the worst pictures, then plots over all of them."""
    one, two = (html.text(label) for label in comparison.labels)
    heading = (
        f"<h1>{two} <small>against</small> {one}</h1>"
        f"<p class=muted>{len(comparison.found)} pictures of the same seeds and requests. PSNR and SSIM compare pictures, "
        f"latent SQNR the sampler's latents after each step.</p>"
    )
    cases = "".join(_case(comparison, entry) for entry in comparison.ranked()[:MOST_ROWS])
    body = (
        html.tiles(_tiles(comparison))
        + f"<h2>Worst pictures first</h2><div class=grid>{cases}</div>"
        + "<h2>All pictures</h2><figure class=plots style='margin:0'>"
        + f"<img src='{html.inlined(plots(comparison))}' alt='latent SQNR by step and PSNR of pictures'></figure>"
    )
    return html.page(f"{comparison.labels[1]} against {comparison.labels[0]}", heading, body)


def _tiles(comparison: Comparison) -> list[html.Tile]:
    data = comparison.to_json()
    slow, fast = data["seconds_per_picture"]
    tiles = [
        html.Tile("PSNR, mean", f"{data['psnr_db']['mean']:.1f} dB", "100 dB: identical"),
        html.Tile("PSNR, worst", f"{data['psnr_db']['worst']:.1f} dB", f"of {len(comparison.found)} pictures"),
        html.Tile("SSIM, mean", f"{data['ssim']['mean']:.4f}", f"worst {data['ssim']['worst']:.4f}"),
        html.Tile("latent SQNR", f"{data['latent_sqnr_db_by_step'][-1]:.1f} dB", "after the last step"),
        html.Tile("time for a picture", f"{fast:.2f} s", f"instead of {slow:.2f} s: {slow / fast:.2f} times as fast"),
    ]
    if comparison.frechet is not None:
        tiles.append(
            html.Tile("Frechet distance", f"{comparison.frechet:.3g}", "of the two sets, autoencoder's features")
        )
    if comparison.reference_frechet is not None:
        first, second = comparison.reference_frechet
        note = f"{second:.4g} and {first:.4g} to {comparison.references} pictures, autoencoder's features"
        worse = 100 * (second / first - 1)
        tiles.append(html.Tile("distance to reference", f"{worse:+.1f} %", note, worse > WORSE_PERCENT))
    return tiles


def _case(comparison: Comparison, entry: Difference) -> str:
    names = (*_short(comparison.labels), f"difference × {AMPLIFIED}")
    shown = [
        f'<div><img src="{html.inlined(html.png(Image.fromarray(picture)))}" alt="{html.text(name)}">'
        f'<div class="name">{html.text(name)}</div></div>'
        for picture, name in zip(_triple(comparison, entry.index), names, strict=True)
    ]
    label = html.text(caption(comparison.requests[entry.index]))
    figures = f"<b>{entry.psnr_db:.1f} dB</b> <small>SSIM {entry.ssim:.3f}</small>"
    return f'<figure class="case"><figcaption>{figures}<br>{label}</figcaption>{"".join(shown)}</figure>'


def _short(labels: tuple[str, str]) -> tuple[str, str]:
    """The labels without the bundle's name where both have the same one."""
    (one, first), (two, second) = (label.split(" ", 1) for label in labels)
    return (first, second) if one == two else labels


def plots(comparison: Comparison) -> bytes:
    """Latent SQNR by step and a histogram of PSNR, as PNG bytes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.4, 3.1), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    steps = np.array([entry.latent_sqnr_db for entry in comparison.found])
    numbers = np.arange(1, steps.shape[1] + 1)
    left.plot(numbers, steps.T, color="#4477aa", alpha=0.25, linewidth=0.8)
    left.plot(numbers, steps.mean(axis=0), color="#4477aa", linewidth=2.2, label="mean")
    left.plot(numbers, steps[comparison.ranked()[0].index], color="#bb5533", linewidth=1.6, label="worst picture")
    left.set(title="latent SQNR after each evaluation (dB)", xlabel="evaluation")
    left.xaxis.get_major_locator().set_params(integer=True)
    left.legend(frameon=False)
    values = [entry.psnr_db for entry in comparison.found]
    right.hist(values, bins="auto" if len(values) > 12 else max(4, len(values)), color="#4477aa", rwidth=0.9)
    right.margins(y=0.15)
    right.axvline(float(np.mean(values)), color="#222222", linewidth=1.2, linestyle="--")
    right.annotate("mean", (float(np.mean(values)), 1), xycoords=("data", "axes fraction"), xytext=(4, -10),
                   textcoords="offset points")  # fmt: skip
    right.set(title="PSNR of pictures (dB)", ylabel="pictures")
    right.yaxis.get_major_locator().set_params(integer=True)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.title.set_fontsize(10)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=160)
    return stream.getvalue()


def figures(comparison: Comparison) -> dict[str, Any]:
    """The figures that the command prints."""
    data = comparison.to_json()
    return {name: data[name] for name in data if name not in ("worst_first", "format", "version")}

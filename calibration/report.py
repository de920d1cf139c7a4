"""Writes a comparison as JSON, as a PNG of pictures side by side, and as one HTML page that needs nothing else."""

from __future__ import annotations

import base64
import html
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from latentedge.calibration.compare import Comparison, caption
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

STYLE = """
:root { color-scheme: light dark; --line: #8884; --muted: #777; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
table { border-collapse: collapse; } td, th { padding: .25rem .9rem .25rem 0; border-bottom: 1px solid var(--line); }
td:not(:first-child), th:not(:first-child) { text-align: right; font-variant-numeric: tabular-nums; }
.grid { display: grid; grid-template-columns: repeat(3, 1fr); gap: .5rem; }
.grid img { width: 100%; image-rendering: pixelated; } .grid .name { grid-column: 1 / -1; color: var(--muted); }
figure { margin: 1rem 0; } figure img { max-width: 100%; background: #fff; } figcaption { color: var(--muted); }
"""


def write_report(comparison: Comparison, folder: Path) -> dict[str, Path]:
    """Write ``comparison.json``, ``.png`` and ``.html`` into ``folder``; gives their paths."""
    files = {kind: folder / f"comparison.{kind}" for kind in ("json", "png", "html")}
    write_atomically(files["json"], (json.dumps(comparison.to_json(), indent=2) + "\n").encode())
    write_atomically(files["png"], _png(grid(comparison)))
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
    """One HTML page with figures, plots and pictures inlined."""
    data = comparison.to_json()
    one, two = (html.escape(label) for label in comparison.labels)
    rows = [
        ("PSNR of pictures, mean", f"{data['psnr_db']['mean']:.2f} dB"),
        ("PSNR of pictures, worst", f"{data['psnr_db']['worst']:.2f} dB"),
        ("SSIM, mean", f"{data['ssim']['mean']:.4f}"),
        ("SSIM, worst", f"{data['ssim']['worst']:.4f}"),
        ("latent SQNR after the last step", f"{data['latent_sqnr_db_by_step'][-1]:.2f} dB"),
        ("seconds per picture", " / ".join(f"{value:.2f}" for value in data["seconds_per_picture"])),
    ]
    if comparison.frechet is not None:
        rows.append(("Frechet distance in the autoencoder's feature space", f"{comparison.frechet:.4g}"))
    if comparison.reference_frechet is not None:
        distances = " / ".join(f"{value:.4g}" for value in comparison.reference_frechet)
        rows.append(("Frechet distance to the reference pictures", distances))
    table = "".join(f"<tr><td>{html.escape(name)}</td><td>{value}</td></tr>" for name, value in rows)
    pictures = []
    for entry in comparison.ranked()[:MOST_ROWS]:
        label = f"{entry.psnr_db:.1f} dB, SSIM {entry.ssim:.3f}: {caption(comparison.requests[entry.index])}"
        pictures.append(f'<div class="name">{html.escape(label)}</div>')
        names = (comparison.labels[0], comparison.labels[1], f"difference times {AMPLIFIED}")
        for picture, name in zip(_triple(comparison, entry.index), names, strict=True):
            pictures.append(f'<img src="{_inlined(_png(Image.fromarray(picture)))}" alt="{html.escape(name)}">')
    plot = _inlined(plots(comparison))
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{one} and {two}</title><style>{STYLE}</style>"
        f"<h1>{one} <small>and</small> {two}</h1><p>{data['pictures']} pictures of the same seeds and requests.</p>"
        f"<table>{table}</table><figure><img src='{plot}' alt='latent SQNR by step and PSNR of pictures'>"
        f"<figcaption>Left: SQNR of the latent after each step, every picture and the mean. "
        f"Right: PSNR of the pictures.</figcaption></figure>"
        f"<h2>Worst first</h2><div class='grid'><div>{one}</div><div>{two}</div>"
        f"<div>difference × {AMPLIFIED}</div>{''.join(pictures)}</div></html>\n"
    )


def plots(comparison: Comparison) -> bytes:
    """Latent SQNR by step and a histogram of PSNR, as PNG bytes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    steps = np.array([entry.latent_sqnr_db for entry in comparison.found])
    left.plot(np.arange(1, steps.shape[1] + 1), steps.T, color="#4477aa", alpha=0.2, linewidth=0.8)
    left.plot(np.arange(1, steps.shape[1] + 1), steps.mean(axis=0), color="#4477aa", linewidth=2)
    left.set(xlabel="evaluation", ylabel="latent SQNR (dB)")
    right.hist([entry.psnr_db for entry in comparison.found], bins="auto", color="#4477aa")
    right.set(xlabel="PSNR (dB)", ylabel="pictures")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=110)
    return stream.getvalue()


def _png(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def _inlined(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


def figures(comparison: Comparison) -> dict[str, Any]:
    """The figures that the command prints."""
    data = comparison.to_json()
    return {name: data[name] for name in data if name not in ("worst_first", "format", "version")}

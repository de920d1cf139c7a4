"""Pages that need nothing else: one file with its style and pictures inlined, light or dark as the reader's system is."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from PIL import Image

STYLE = """
:root { color-scheme: light dark; --line: #8883; --muted: #767676; --panel: #8881; --bar: #4477aa; --bad: #bb5533; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 66rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; margin: 0; } h2 { font-size: 1.1rem; margin: 2.2rem 0 .6rem; } p { margin: .3rem 0; }
.muted, small { color: var(--muted); font-weight: normal; } .bad { color: var(--bad); }
.tiles { display: flex; flex-wrap: wrap; gap: .7rem; margin: 1.2rem 0; }
.tile { background: var(--panel); border-radius: .5rem; padding: .6rem .9rem; flex: 1 1 9rem; }
.tile b { display: block; font-size: 1.45rem; line-height: 1.3; font-variant-numeric: tabular-nums; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th { text-align: left; color: var(--muted); font-weight: normal; font-size: .85rem; }
td, th { padding: .25rem .9rem .25rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
.number { text-align: right; } .number, td:has(.bar) { white-space: nowrap; }
.bar { display: inline-block; height: .7em; background: var(--bar); border-radius: 2px; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(19rem, 1fr)); gap: 1.1rem; }
.case { display: grid; grid-template-columns: repeat(3, 1fr); gap: .3rem; margin: 0; }
.case img { width: 100%; image-rendering: pixelated; } .case figcaption { grid-column: 1 / -1; line-height: 1.35; }
.case .name { color: var(--muted); font-size: .8rem; text-align: center; }
.plots img { width: 100%; background: #fff; border-radius: .5rem; }
"""


@dataclass(frozen=True)
class Tile:
    """One figure that is read first: its name, its value, and what to read it against."""

    name: str
    value: str
    note: str = ""
    bad: bool = False


def page(title: str, heading: str, body: str) -> str:
    """A whole page; ``heading`` and ``body`` are HTML, ``title`` is text."""
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{text(title)}</title><style>{STYLE}</style>{heading}{body}</html>\n"
    )


def text(value: object) -> str:
    """A value as HTML text."""
    return html.escape(str(value))


def tiles(entries: Iterable[Tile]) -> str:
    """The figures in large type."""
    cells = [
        f'<div class="tile"><span class="muted">{text(tile.name)}</span>'
        f"<b{' class=bad' if tile.bad else ''}>{text(tile.value)}</b><small>{text(tile.note)}</small></div>"
        for tile in entries
    ]
    return f'<div class="tiles">{"".join(cells)}</div>'


def table(head: Sequence[str], rows: Iterable[Sequence[str]], numbers: Sequence[int] = ()) -> str:
    """A table of cells that are HTML already; columns in ``numbers`` are set to the right."""

    def row(cells: Sequence[str], kind: str) -> str:
        shown = [
            f"<{kind}{' class=number' if index in numbers else ''}>{cell}</{kind}>" for index, cell in enumerate(cells)
        ]
        return f"<tr>{''.join(shown)}</tr>"

    return f"<table>{row([text(name) for name in head], 'th')}{''.join(row(cells, 'td') for cells in rows)}</table>"


def bar(share: float) -> str:
    """A bar of at most 5 em for a share of 0 to 1."""
    return f'<span class="bar" style="width:{5 * min(max(share, 0.0), 1.0):.2f}em"></span>'


def inlined(data: bytes) -> str:
    """PNG bytes as a URL."""
    return "data:image/png;base64," + base64.b64encode(data).decode()


def png(image: Image.Image) -> bytes:
    """A picture as PNG bytes."""
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()

"""PNG files that say how they were drawn, and contact sheets."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo

from latentedge.runtime.errors import UsageError
from latentedge.runtime.images import open_picture

TEXT_CHUNK = "latentedge"


def save_picture(image: Image.Image, path: Path, request: dict[str, Any]) -> None:
    """Write a PNG with ``request`` as text chunks (JSON under ``latentedge``, and one chunk for each entry)."""
    text = PngInfo()
    text.add_itxt(TEXT_CHUNK, json.dumps(request, sort_keys=True))
    for name, value in request.items():
        text.add_itxt(name, value if isinstance(value, str) else json.dumps(value))
    aside = path.with_name(f".{path.name}.part")
    image.save(aside, format="PNG", pnginfo=text)
    os.replace(aside, path)


def request_of(path: Path) -> dict[str, Any]:
    """The request that a picture was drawn with; :class:`UsageError` if the file does not say."""
    text = open_picture(path).info.get(TEXT_CHUNK)
    if text is None:
        raise UsageError(f"{path} was not written by `latentedge generate`: it has no {TEXT_CHUNK} text chunk.")
    request: dict[str, Any] = json.loads(text)
    return request


def contact_sheet(images: Sequence[Image.Image], captions: Sequence[str], columns: int = 4) -> Image.Image:
    """Pictures in a grid with captions below, each enlarged to at least 160 pixels."""
    factor = max(1, round(160 / images[0].width))
    width, height = images[0].width * factor, images[0].height * factor
    caption_height, gap = 30, 8
    rows = -(-len(images) // columns)
    columns = min(columns, len(images))
    size = (gap + columns * (width + gap), gap + rows * (height + caption_height + gap))
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for index, (image, caption) in enumerate(zip(images, captions, strict=True)):
        left = gap + index % columns * (width + gap)
        top = gap + index // columns * (height + caption_height + gap)
        sheet.paste(image.resize((width, height), Image.Resampling.BICUBIC), (left, top))
        draw.multiline_text((left, top + height + 2), wrapped(draw, caption, width), fill="black", spacing=1)
    return sheet


def wrapped(draw: ImageDraw.ImageDraw, text: str, width: int) -> str:
    """``text`` in at most two lines that fit ``width`` pixels."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if draw.textlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return "\n".join(lines[:2])

"""One prompt and one seed under every sampler at several step counts, on one sheet: ``docs/samplers.png``.

python -m latentedge.benchmarks.sampler_sheet emoji.bundle "panda, noto, on an orange background" -o docs/samplers.png
"""

from __future__ import annotations

from pathlib import Path

import click
from PIL import Image, ImageDraw

from latentedge.runtime.errors import UsageError
from latentedge.runtime.pipeline import Pipeline
from latentedge.runtime.samplers import names

STEPS = (5, 10, 20, 50)
SIDE, LABEL, GAP = 96, 130, 4


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("prompt")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True)
@click.option("--seed", type=int, default=7, show_default=True)
@click.option("--columns", type=int, default=2, show_default=True, help="Columns of samplers.")
def main(bundle: Path, prompt: str, output: Path, seed: int, columns: int) -> None:
    """Draw PROMPT with BUNDLE under every sampler; what a sampler refuses is said on the sheet."""
    with Pipeline.open(bundle) as pipeline:
        rows = [(name, [_draw(pipeline, prompt, seed, name, steps) for steps in STEPS]) for name in names()]
    per_column = -(-len(rows) // columns)
    block = LABEL + len(STEPS) * (SIDE + GAP)
    sheet = Image.new("RGB", (columns * block, 20 + per_column * (SIDE + GAP)), "white")
    draw = ImageDraw.Draw(sheet)
    for column in range(columns):
        for number, steps in enumerate(STEPS):
            draw.text((column * block + LABEL + number * (SIDE + GAP), 4), f"{steps} steps", fill="black")
    for index, (name, pictures) in enumerate(rows):
        left, top = index // per_column * block, 20 + index % per_column * (SIDE + GAP)
        draw.text((left + 4, top + SIDE // 2), name, fill="black")
        for number, picture in enumerate(pictures):
            place = (left + LABEL + number * (SIDE + GAP), top)
            if isinstance(picture, str):
                draw.text((place[0], place[1] + SIDE // 2), picture, fill="black")
            else:
                sheet.paste(picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC), place)
    sheet.save(output)


def _draw(pipeline: Pipeline, prompt: str, seed: int, sampler: str, steps: int) -> Image.Image | str:
    try:
        return pipeline.generate(prompt, seed=seed, sampler=sampler, steps=steps).images[0]
    except UsageError as error:
        click.echo(f"{sampler} at {steps} steps: {error}", err=True)
        return "not possible"


if __name__ == "__main__":
    main()

"""The prompt files: ``python -m examples.emoji.prompt_lists`` writes prompts/heldout.txt and prompts/calibration.txt.

Held-out prompts ask for combinations of concept, style and background that the denoiser was never trained on;
calibration prompts for ones that it was.
"""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np

from examples.emoji.captions import BACKGROUNDS, HERE, STYLES, caption, read_concepts
from examples.emoji.data import held_out


def prompts(count: int, *, unseen: bool, seed: int) -> list[str]:
    """``count`` captions of different concepts, whose combinations are all held out or all trained on."""
    concepts, styles, backgrounds = read_concepts(), list(STYLES), list(BACKGROUNDS)
    random = np.random.default_rng(seed)
    allowed = held_out(len(concepts)) == unseen
    chosen: list[str] = []
    for concept in random.permutation(len(concepts)):
        places = np.argwhere(allowed[concept])
        if len(places):
            style, background = places[random.integers(len(places))]
            chosen.append(caption(concepts[concept].names[-1], styles[style], backgrounds[background]))
        if len(chosen) == count:
            break
    return chosen


@click.command()
@click.option("--to", "target", type=click.Path(path_type=Path, exists=True), default=HERE / "prompts")
def main(target: Path) -> None:
    """Write both lists."""
    for name, unseen, seed in (("heldout", True, 31), ("calibration", False, 32)):
        lines = prompts(64, unseen=unseen, seed=seed)
        (target / f"{name}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

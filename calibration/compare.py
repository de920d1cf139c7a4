"""Draws the same requests with two variants or bundles and reports how far apart the pictures are."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from latentedge.calibration.metrics import frechet_distance, latent_features
from latentedge.calibration.pictures import Difference, Drawn, differences, draw
from latentedge.calibration.requests import read_prompts, requests
from latentedge.runtime.bundle import Array, Bundle
from latentedge.runtime.errors import UsageError
from latentedge.runtime.pipeline import Pipeline
from latentedge.runtime.request import Request
from latentedge.runtime.selection import choose


@dataclass(frozen=True)
class Side:
    """One of the two that are compared: ``BUNDLE``, ``BUNDLE:precision`` or ``BUNDLE:backend:precision``."""

    path: Path
    backend: str = "auto"
    precision: str = "auto"

    @classmethod
    def parse(cls, text: str) -> Side:
        """A side from the command line; :class:`UsageError` for anything else."""
        path, *rest = text.rsplit(":", 2) if not Path(text).exists() else [text]
        if not Path(path).exists() and len(rest) == 2:
            path, rest = f"{path}:{rest[0]}", rest[1:]
        if not Path(path).is_dir():
            raise UsageError(f"{text!r} names no bundle.", hint="for example emoji.bundle:openvino:int8")
        if len(rest) == 2:
            return cls(Path(path), rest[0], rest[1])
        return cls(Path(path), "auto", rest[0] if rest else "auto")

    def opened(self) -> Pipeline:
        """Its pipeline."""
        return Pipeline.open(self.path, self.backend, self.precision)

    def label(self) -> str:
        """The bundle's folder, backend and precision, as they were chosen."""
        choice = choose(Bundle.open(self.path), self.backend, self.precision)
        return f"{self.path.name} {choice.backend} {choice.precision}"


@dataclass(frozen=True)
class Comparison:
    """What was measured. ``frechet`` compares the two sets in the autoencoder's feature space; it is not FID."""

    labels: tuple[str, str]
    requests: list[dict[str, Any]]
    found: list[Difference]
    first: Drawn
    second: Drawn
    frechet: float | None
    #: Distance of each side to reference pictures, and how many there are, where they were given.
    reference_frechet: tuple[float, float] | None = None
    references: int = 0

    def to_json(self) -> dict[str, Any]:
        """All figures, worst picture first."""
        psnr = [entry.psnr_db for entry in self.found]
        steps = np.array([entry.latent_sqnr_db for entry in self.found])
        return {
            "format": "latentedge-comparison",
            "version": 1,
            "first": self.labels[0],
            "second": self.labels[1],
            "pictures": len(self.found),
            "psnr_db": {"mean": float(np.mean(psnr)), "worst": float(np.min(psnr))},
            "ssim": {
                "mean": float(np.mean([entry.ssim for entry in self.found])),
                "worst": float(np.min([entry.ssim for entry in self.found])),
            },
            "latent_sqnr_db_by_step": [float(value) for value in steps.mean(axis=0)],
            "frechet_distance_in_autoencoder_features": self.frechet,
            "frechet_distance_to_reference": self._to_reference(),
            "seconds_per_picture": [float(np.median(side.seconds)) for side in (self.first, self.second)],
            "worst_first": [
                {**dataclasses.asdict(entry), "request": _plain(self.requests[entry.index])} for entry in self.ranked()
            ],
        }

    def _to_reference(self) -> dict[str, Any] | None:
        if self.reference_frechet is None:
            return None
        first, second = self.reference_frechet
        return {"first": first, "second": second, "ratio": second / first, "pictures": self.references}

    def ranked(self) -> list[Difference]:
        """Pictures by PSNR, worst first."""
        return sorted(self.found, key=lambda entry: entry.psnr_db)


def _plain(request: dict[str, Any]) -> dict[str, Any]:
    """A request without its arrays."""
    return {name: value for name, value in request.items() if isinstance(value, (str, int, float))}


def caption(request: dict[str, Any]) -> str:
    """What a picture is labelled with."""
    for name in ("prompt", "class_label"):
        if name in request:
            return f"{request[name]} (seed {request['seed']})"
    return f"seed {request['seed']}"


def compare(
    first: Side,
    second: Side,
    count: int,
    steps: int | None = None,
    prompts: Path | None = None,
    references: Path | None = None,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> Comparison:
    """Draw ``count`` held-out requests with both sides; the same seeds, prompts and steps."""
    texts = read_prompts(prompts) if prompts is not None else None
    drawn: list[Drawn] = []
    features: list[Array | None] = []
    reference: Array | None = None
    made = requests(Bundle.open(first.path), count, steps, texts, held_out=True)
    for number, side in enumerate((first, second)):
        with side.opened() as pipeline:
            for request in made:
                Request.of(request.get("prompt"), {k: v for k, v in request.items() if k != "prompt"}).check(
                    pipeline.bundle
                )

            def advance(done: int, total: int, number: int = number) -> None:
                progress("pictures", number * total + done, 2 * total)

            drawn.append(draw(pipeline, made, advance))
            features.append(None)
    if drawn[0].pictures.shape != drawn[1].pictures.shape or len(drawn[0].latents) != len(drawn[1].latents):
        raise UsageError(
            f"the sides draw differently: pictures {list(drawn[0].pictures.shape)} and {list(drawn[1].pictures.shape)}, "
            f"{len(drawn[0].latents)} and {len(drawn[1].latents)} evaluations.",
            hint="give --steps, and compare bundles of one model",
        )
    with Pipeline.open(first.path, "auto", "fp32") as judge:
        if "vae_encoder" in judge.bundle.components:
            features = [_features(judge, side.pictures) for side in drawn]
            if references is not None:
                reference = _features(judge, _pictures_in(references, drawn[0].pictures.shape[1:3]))
    one, two = features
    usable = one is not None and two is not None and count > 1
    return Comparison(
        (first.label(), second.label()),
        made,
        differences(drawn[0], drawn[1]),
        drawn[0],
        drawn[1],
        frechet_distance(one, two) if usable and one is not None and two is not None else None,
        (frechet_distance(one, reference), frechet_distance(two, reference))
        if usable and one is not None and two is not None and reference is not None
        else None,
        0 if reference is None else len(reference),
    )


def _features(judge: Pipeline, pictures: Array) -> Array:
    """Features of pictures ``[N, H, W, 3]`` from the fp32 encoder's latents."""
    return latent_features(np.concatenate([judge.encode(picture[None]) for picture in pictures]))


def _pictures_in(folder: Path, size: tuple[int, ...]) -> Array:
    """The pictures of a folder (PNG, JPEG, or an NPZ of uint8 ``[N, H, W, 3]``), float32 in 0..1 and of one size."""
    from PIL import Image

    if folder.suffix == ".npz":
        pictures = _packed_pictures(folder)
    elif not folder.is_dir():
        raise UsageError(f"{folder} is neither a folder of pictures nor an .npz file.")
    else:
        files = sorted(file for file in folder.iterdir() if file.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"))
        pictures = [Image.open(file).convert("RGB") for file in files]
    if len(pictures) < 2:
        raise UsageError(f"{folder} holds fewer than two pictures.")
    resized = [picture.resize((size[1], size[0]), Image.Resampling.BICUBIC) for picture in pictures]
    return np.stack([np.asarray(picture, np.float32) / 255 for picture in resized])


def _packed_pictures(file: Path) -> list[Any]:
    """The first array of an NPZ file, uint8 ``[N, H, W, 3]``."""
    from PIL import Image

    try:
        with np.load(file, allow_pickle=False) as arrays:
            stacked = np.asarray(arrays[arrays.files[0]])
    except (OSError, ValueError, IndexError) as error:
        raise UsageError(f"{file} cannot be read as pictures: {error}.") from error
    if stacked.ndim != 4 or stacked.shape[3] != 3 or stacked.dtype != np.uint8:
        raise UsageError(f"{file}: expected uint8 pictures [N, H, W, 3], found {stacked.dtype} {list(stacked.shape)}.")
    return [Image.fromarray(picture) for picture in stacked]

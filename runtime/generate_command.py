"""``latentedge generate``: pictures from a bundle on the command line."""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import numpy as np

from latentedge.runtime.errors import Interrupted, UsageError
from latentedge.runtime.picture_files import contact_sheet, request_of, save_picture
from latentedge.runtime.sections import SectionedCommand

#: Options of ``generate`` that name a request's argument, and are written into the PNG file.
REPLAYED = (
    "negative_prompt",
    "steps",
    "sampler",
    "guidance_scale",
    "guidance_rescale",
    "guidance_interval",
    "guidance_every",
    "eta",
    "strength",
    "rng",
    "height",
    "width",
    "class_label",
    "image",
    "mask",
    "layout",
    "semantic_map",
    "embeddings",
    "tile",
)

#: The command's options by heading of its help.
SECTIONS = {
    "What to draw": ("prompts", "negative_prompt", "image", "mask", "class_label", "layout", "semantic_map",
                     "embeddings", "replay"),
    "How": ("seed", "steps", "sampler", "guidance_scale", "strength", "size", "tile", "eta", "rng"),
    "Where it goes": ("output", "sheet", "preview", "as_json"),
    "What computes it": ("backend", "precision", "low_memory", "memory_limit", "cache_interval", "auto_quality"),
}  # fmt: skip


def seeds_from(text: str) -> list[int]:
    """``"7"``, ``"1,2,5"`` or ``"10-13"`` as a list of seeds; :class:`UsageError` for anything else."""
    seeds: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        try:
            seeds += range(int(first), int(last) + 1) if dash else [int(first)]
        except ValueError as error:
            raise UsageError(f"--seed takes numbers like 7, 1,2,5 or 10-13, found {text!r}.") from error
    if not seeds:
        raise UsageError(f"--seed {text!r} names no seed.")
    return seeds


def size_from(text: str) -> tuple[int, int]:
    """``"512"`` or ``"768x512"`` (width x height) as (height, width)."""
    width, _, height = text.lower().partition("x")
    try:
        return int(height or width), int(width)
    except ValueError as error:
        raise UsageError(f"--size takes 512 or 768x512 (width x height), found {text!r}.") from error


def guidance_from(text: str) -> dict[str, Any]:
    """``"7.5"`` or ``"7.5:rescale=0.7,interval=0.3-5,every=3"`` (sigmas, evaluations) as a request's arguments."""
    scale, colon, rest = text.partition(":")
    readers: dict[str, Callable[[str], Any]] = {"rescale": float, "interval": _interval, "every": _every}
    try:
        found: dict[str, Any] = {"guidance_scale": float(scale)}
        for entry in rest.split(",") if colon else ():
            name, _, value = entry.partition("=")
            found["guidance_" + name.strip()] = readers[name.strip()](value.strip())
    except (KeyError, ValueError) as error:
        form = "a number, or 7.5:rescale=0.7,interval=0.3-5,every=3 (or every=0+2+7)"
        raise UsageError(f"--guidance-scale takes {form}, found {text!r}.") from error
    return found


def caching_from(text: str | int | None) -> dict[str, Any]:
    """``"3"`` (every third step in full) or ``"0,2,5,9"`` (these, counted from 0) as engine options."""
    try:
        numbers = tuple(int(part) for part in ("1" if text is None else str(text)).split(","))
    except ValueError:
        numbers = (0,)
    ordered = numbers[0] == 0 and all(low < high for low, high in itertools.pairwise(numbers))
    if len(numbers) == 1 and numbers[0] > 0:
        return {"cache_interval": numbers[0]}
    if len(numbers) == 1 or not ordered:
        raise UsageError(
            f"--cache-interval takes 3, or steps from 0 on in rising order such as 0,2,5,9, found {text!r}."
        )
    return {"cache_full": numbers}


def _caching_of(options: Any) -> dict[str, str]:
    """The same as it is recorded with a picture; nothing where every step is in full."""
    if not options.caching:
        return {}
    full = options.cache_full or (options.cache_interval,)
    return {"cache_interval": ",".join(str(number) for number in full)}


def _interval(text: str) -> list[float]:
    low, high = (float(part) for part in text.split("-"))
    return [low, high]


def _every(text: str) -> int | list[int]:
    numbers = [int(part) for part in text.split("+")]
    return numbers if len(numbers) > 1 else numbers[0]


def preview_from(text: str) -> tuple[Path, int]:
    """``"grow.png"`` or ``"grow.png:2"`` as a file and the steps between two previews, 5 by default."""
    file, colon, every = text.rpartition(":")
    if not colon:
        return Path(text), 5
    if not every.isdigit() or int(every) < 1:
        raise UsageError(f"--preview takes FILE or FILE:STEPS such as grow.png:2, found {text!r}.")
    return Path(file), int(every)


def check_files(*paths: Path | None) -> None:
    """:class:`UsageError` for a picture file that could not be written, before anything is drawn."""
    for path in filter(None, paths):
        if path.suffix.lower() != ".png":
            raise UsageError(f"pictures are written as PNG, found {path}.", hint="end the file's name with .png")
        if not path.parent.is_dir():
            raise UsageError(f"there is no folder {path.parent} to write {path.name} into.")


@click.command(cls=SectionedCommand, sections=SECTIONS)
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("prompt", required=False)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="PNG file; several pictures get numbers.")
@click.option("--prompts", type=click.Path(exists=True, path_type=Path), help="A file with one prompt a line.")
@click.option("--negative-prompt", help="What the picture should not show.")
@click.option("--seed", help="A seed, a list 1,2,5 or a range 10-13: one picture for each.")
@click.option("--steps", type=int, help="Sampler steps.")
@click.option("--sampler", help="Sampler by name; an unknown name lists them.")
@click.option("--guidance-scale", metavar="SCALE", help="Guidance; 1 is none. 7.5:rescale=0.7,interval=0.3-5,every=2")
@click.option("--size", help="512 or 768x512 (width x height).")
@click.option("--image", type=click.Path(), help="Picture to start from, complete, enlarge or reconstruct.")
@click.option("--mask", type=click.Path(), help="Where to paint: white in a grey picture.")
@click.option("--strength", type=float, help="How much of the picture is redrawn, 0 to 1.")
@click.option("--class", "class_label", type=int, help="Class number.")
@click.option("--layout", type=click.Path(), help="JSON file with boxes.")
@click.option("--semantic-map", type=click.Path(), help="PNG file whose pixel values are labels.")
@click.option("--embeddings", type=click.Path(), help="NPY file with CLIP embeddings.")
@click.option("--eta", type=float, help="DDIM's noise, 0 to 1.")
@click.option(
    "--rng",
    type=click.Choice(["torch", "cuda", "numpy"]),
    default="torch",
    show_default=True,
    help="Whose noise a seed gives.",
)
@click.option("--tile", type=int, help="Side of tiles in latent pixels; 0: none.")
@click.option("--preview", metavar="FILE[:STEPS]", help="PNG file that shows the picture as it grows, every 5 steps.")
@click.option("--sheet", type=click.Path(path_type=Path), help="Also write all pictures as one contact sheet.")
@click.option("--from", "replay", type=click.Path(path_type=Path), help="Draw a picture file again.")
@click.option(
    "--backend", default="auto", show_default=True, help="Engine library, settings after a colon: tensorrt:device=1."
)
@click.option("--precision", default="auto", show_default=True, help="fp32, fp16, bf16 or int8.")
@click.option("--low-memory", is_flag=True, help="Load one network at a time; guidance in two runs.")
@click.option(
    "--cache-interval", metavar="N|LIST", help="Compute deep blocks in every n-th step (step caching), or in 0,2,5,9."
)
@click.option("--memory-limit", metavar="SIZE", help="Choose what was measured to fit, say 2GiB; tells what it costs.")
@click.option("--auto-quality", metavar="DB", type=float, help="Choose step caching measured at this PSNR or better.")
@click.option("--json", "as_json", is_flag=True, help="Print files, seeds and timings as JSON.")
def generate(
    bundle: Path,
    prompt: str | None,
    output: Path | None,
    prompts: Path | None,
    seed: str | None,
    size: str | None,
    preview: str | None,
    sheet: Path | None,
    replay: Path | None,
    backend: str,
    precision: str,
    low_memory: bool,
    cache_interval: str | None,
    memory_limit: str | None,
    auto_quality: float | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Draw pictures from BUNDLE, steered by PROMPT or by what the model takes."""
    from latentedge.runtime.engines import EngineOptions
    from latentedge.runtime.pipeline import Pipeline
    from latentedge.runtime.tradeoffs import Wishes, in_words, parse_bytes, peak_memory, settle

    if output is None and sheet is None:
        raise UsageError("no output: give -o PICTURE.png, or --sheet SHEET.png.")
    growing = None if preview is None else preview_from(preview)
    check_files(output, sheet, growing and growing[0])
    if size is not None:
        options["height"], options["width"] = size_from(size)
    options = {name: value for name, value in options.items() if value is not None}
    if "guidance_scale" in options:
        options |= guidance_from(options.pop("guidance_scale"))
    recorded: dict[str, Any] = {}
    if replay is not None:
        if prompt is not None or prompts is not None or seed is not None:
            raise UsageError("--from takes prompt and seed from the picture; leave them out.")
        recorded = request_of(replay)
        backend = recorded.pop("backend", backend) if backend == "auto" else backend
        precision = recorded.pop("precision", precision) if precision == "auto" else precision
        cache_interval = recorded.pop("cache_interval", None)
        requests = [_replayed(recorded, options)]
    else:
        requests = _requests(prompt, prompts, seed, options)
    wishes = Wishes(parse_bytes(memory_limit), auto_quality)
    (backend, precision), engine_options = settle(
        bundle,
        (backend, precision),
        EngineOptions(low_memory=low_memory, **caching_from(cache_interval)),
        wishes,
        requests,
        lambda line: click.echo(line, err=True),
    )
    with Pipeline.open(bundle, backend, precision, options=engine_options) as pipeline:
        if recorded and recorded.get("bundle") != pipeline.digest():
            click.echo(f"warning: {replay} was drawn from another bundle than {bundle}", err=True)
        shower = None if growing is None else Shower(pipeline, *growing)
        drawn = list(_draw(pipeline, requests, output, shower))
    if wishes.memory_limit is not None and (peak := peak_memory()) is not None:
        click.echo(f"peak of memory: {in_words(peak)} of {in_words(wishes.memory_limit)}", err=True)
    if sheet is not None:
        captions = [str(entry["request"].get("prompt", entry["request"]["seed"])) for entry in drawn]
        contact_sheet([entry.pop("picture") for entry in drawn], captions).save(sheet)
        click.echo(f"{len(drawn)} pictures on {sheet}", err=True)
    if as_json:
        rows = [{key: value for key, value in entry.items() if key != "picture"} for entry in drawn]
        click.echo(json.dumps(rows, indent=2, default=str))


def _replayed(recorded: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """The request of a picture file, with what the command line says anew; "rng" always has a value there."""
    kept = {name: value for name, value in recorded.items() if name not in ("bundle", "backend", "precision")}
    return {**kept, **{name: value for name, value in options.items() if name != "rng"}}


def _requests(
    prompt: str | None, prompts: Path | None, seed: str | None, options: dict[str, Any]
) -> list[dict[str, Any]]:
    """One request for each prompt and seed."""
    texts: list[str | None] = [prompt]
    if prompts is not None:
        if prompt is not None:
            raise UsageError("give either PROMPT or --prompts.")
        lines = prompts.read_text(encoding="utf-8").splitlines()
        texts = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
        if not texts:
            raise UsageError(f"{prompts} holds no prompt.")
    seeds = [int(np.random.SeedSequence().generate_state(1)[0])] if seed is None else seeds_from(seed)
    return [
        {**({} if text is None else {"prompt": text}), **options, "seed": number} for text in texts for number in seeds
    ]


def _draw(
    pipeline: Any, requests: list[dict[str, Any]], output: Path | None, shower: Shower | None
) -> Iterator[dict[str, Any]]:
    for number, request in enumerate(requests):
        arguments = dict(request)
        if isinstance(arguments.get("embeddings"), str):
            arguments["embeddings"] = _load_array(Path(arguments["embeddings"]))
        prompt = arguments.pop("prompt", None)
        started = time.perf_counter()
        steps = arguments.get("steps") or pipeline.bundle.defaults.steps
        with _progress(steps, f"{number + 1}/{len(requests)}" if len(requests) > 1 else "drawing") as advance:
            result = _generate(pipeline, prompt, arguments, advance, shower)
        recorded = {"bundle": pipeline.digest(), **_resolved(pipeline, request, result)}
        entry: dict[str, Any] = {"request": recorded, "seconds": time.perf_counter() - started}
        if output is not None:
            entry["file"] = str(_numbered(output, number, len(requests)))
            save_picture(result.images[0], Path(entry["file"]), recorded)
            click.echo(f"{entry['file']}  seed {recorded['seed']}  {entry['seconds']:.1f} s", err=True)
        yield {**entry, "timings": result.timings, "picture": result.images[0]}


def _generate(
    pipeline: Any, prompt: str | None, arguments: dict[str, Any], advance: Callable[[], None], shower: Shower | None
) -> Any:
    def callback(step: Any) -> None:
        advance()
        if shower is not None:
            shower.show(step)

    try:
        return pipeline.generate(prompt, callback=callback, **arguments)
    except KeyboardInterrupt as error:
        kept = f" The last preview is {shower.path}." if shower is not None and shower.shown else ""
        raise Interrupted(f"interrupted.{kept}") from error


def _resolved(pipeline: Any, request: dict[str, Any], result: Any) -> dict[str, Any]:
    """The request with the defaults that were used, so that the picture can be drawn again by a later version."""
    defaults = pipeline.bundle.defaults
    used = {"steps": defaults.steps, "sampler": defaults.sampler, "guidance_scale": defaults.guidance_scale}
    recorded = {name: value for name, value in used.items() if value is not None}
    recorded |= {name: request[name] for name in ("prompt", *REPLAYED) if name in request}
    engine = {"backend": pipeline.backend, "precision": pipeline.precision, **_caching_of(pipeline.options)}
    return {**recorded, "seed": result.seed, **engine}


class Shower:
    """Writes a preview of the denoised picture every few steps, by the bundle's linear latent-to-RGB map or the decoder."""

    def __init__(self, pipeline: Any, path: Path, every: int) -> None:
        self.path, self.shown = path, False
        self._pipeline, self._every = pipeline, every

    def show(self, step: Any) -> None:
        """Write the preview if it is this step's turn."""
        if step.index % self._every == 0:
            self._pipeline.preview(step.denoised)[0].save(self.path)
            self.shown = True


@contextmanager
def _progress(steps: int, label: str) -> Iterator[Callable[[], None]]:
    """A progress bar with seconds a step and time left on a terminal, nothing elsewhere."""
    if not sys.stderr.isatty():
        yield lambda: None
        return
    started, done = time.perf_counter(), [0]
    bar: Any
    with click.progressbar(
        length=steps,
        label=label,
        file=sys.stderr,
        show_eta=True,
        item_show_func=lambda _: f"{(time.perf_counter() - started) / max(done[0], 1):.2f} s/step",
    ) as bar:

        def advance() -> None:
            done[0] += 1
            bar.update(1, done[0])

        yield advance


def _numbered(output: Path, number: int, total: int) -> Path:
    return output if total == 1 else output.with_name(f"{output.stem}-{number + 1:0{len(str(total))}d}{output.suffix}")


def _load_array(path: Path) -> Any:
    try:
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read as an NPY array: {error}.") from error

"""``latentedge export`` and ``export-and-build``. Imports torch only when a command runs."""

from __future__ import annotations

import contextlib
import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeVar

import click

from latentedge.export.targets import DEFAULT_TARGET, targets
from latentedge.runtime.bundle import Bundle
from latentedge.runtime.errors import Interrupted, UsageError

if TYPE_CHECKING:
    from latentedge.export.model import SourceOptions

Command = TypeVar("Command", bound=Callable[..., Any])

_OPTIONS = (
    click.argument("source"),
    click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Folder of the new bundle."),
    click.option("--precision", default="fp32", show_default=True, help="Variants to write: fp32, fp16 or fp32,fp16."),
    click.option(
        "--target",
        type=click.Choice(list(targets())),
        default=DEFAULT_TARGET,
        show_default=True,
        help="What the graphs must run on.",
    ),
    click.option("--config", type=click.Path(path_type=Path), help="YAML file of a single-file checkpoint."),
    click.option("--tokenizer", help="Folder or hub id of the tokenizer, where the checkpoint has none."),
    click.option("--lora", "loras", multiple=True, metavar="FILE:WEIGHT", help="LoRA to merge in; may be repeated."),
    click.option(
        "--even-sizes",
        is_flag=True,
        help="Only sizes that the UNet can halve to its lowest level (multiples of 64 pixels for most); faster.",
    ),
    click.option("--overwrite", is_flag=True, help="Replace an existing bundle."),
    click.option("--json", "as_json", is_flag=True, help="Write the summary to stdout as JSON."),
)


def _with_options(command: Command) -> Command:
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


@click.command()
@_with_options
def export(as_json: bool, **arguments: Any) -> None:
    """Turn a checkpoint into a bundle, and prove every network against the original.

    SOURCE is a checkpoint folder (CompVis: one .ckpt or .safetensors and one .yaml; diffusers: model_index.json; ONNX
    as optimum writes it), a single file, or a hub id.
    """
    from latentedge.export.summary import print_summary, summary_of

    bundle = run_export(**arguments)
    if as_json:
        click.echo(json.dumps(summary_of(bundle), indent=2))
    print_summary(bundle)


@click.command("export-and-build")
@_with_options
@click.option("--backend", default="onnxruntime", show_default=True, help="Engine library to build for.")
def export_and_build(as_json: bool, backend: str, **arguments: Any) -> None:
    """Export a checkpoint, then build and time its engines on this machine.

    SOURCE is what `latentedge export` takes.
    """
    from latentedge.export.builders import BuildRequest, builder_of
    from latentedge.export.summary import print_summary, summary_of
    from latentedge.runtime.engines import backend as find_backend

    find_backend(backend)
    exported = run_export(**arguments)
    request = BuildRequest(exported, backend, notify=lambda message: click.echo(f"note: {message}", err=True))
    builder_of(backend)(request)
    bundle = Bundle.open(exported.path)
    if as_json:
        click.echo(json.dumps(summary_of(bundle), indent=2))
    print_summary(bundle)


def run_export(
    source: str,
    output: Path,
    precision: str,
    target: str,
    config: Path | None,
    tokenizer: str | None,
    loras: tuple[str, ...],
    even_sizes: bool,
    overwrite: bool,
) -> Bundle:
    """Load the source and export it, with progress on a terminal."""
    from latentedge.export.bundle_writer import check_output
    from latentedge.export.exporter import ExportOptions, check_precisions, export_source
    from latentedge.export.model import SourceOptions
    from latentedge.export.sources import load_source
    from latentedge.export.summary import progress_on_terminal

    precisions = precisions_from(precision)
    source_options: SourceOptions = SourceOptions(
        config, tokenizer, tuple(lora_from(text) for text in loras), even_sizes
    )
    check_precisions(precisions)
    check_output(output, overwrite=overwrite)
    model = load_source(source, source_options)
    names = [component.spec.name for component in model.components]
    with _termination_cleans_up(), progress_on_terminal(names) as (progress, notify):
        options = ExportOptions(precisions, target, overwrite, notify=notify, progress=progress)
        return export_source(model, output, options)


@contextlib.contextmanager
def _termination_cleans_up() -> Iterator[None]:
    """Inside, SIGTERM is an error like any other, so that what was written aside is removed."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Interrupted(f"stopped by {signal.Signals(number).name}; nothing was written")

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def precisions_from(text: str) -> tuple[str, ...]:
    """``"fp32,fp16"`` as names in that order, each once."""
    return tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


def lora_from(text: str) -> tuple[Path, float]:
    """``"style.safetensors:0.8"`` as (file, weight); without a weight it is 1."""
    file, colon, weight = text.rpartition(":")
    if not colon:
        return Path(text), 1.0
    try:
        return Path(file), float(weight)
    except ValueError as error:
        raise UsageError(
            f"--lora takes FILE or FILE:WEIGHT, found {text!r}.",
            hint="the weight is a number: `--lora style.safetensors:0.8`",
        ) from error

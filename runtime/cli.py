"""The command line. Each command's module is loaded only when that command is called."""

from __future__ import annotations

import errno
import importlib
import sys
import traceback
from typing import Any, NoReturn

import click

from latentedge.runtime.errors import LatentEdgeError, MissingDependencyError

#: Command by name: where it is, what it does, and the extra that it needs.
COMMANDS: dict[str, tuple[str, str, str | None]] = {
    "export": ("latentedge.export.commands:export", "Turn a checkpoint into a proven bundle.", "export"),
    "export-and-build": (
        "latentedge.export.commands:export_and_build",
        "Export a checkpoint and build its engines.",
        "export",
    ),
    "calibrate": ("latentedge.calibration.commands:calibrate", "Quantise a bundle to INT8.", "calibration"),
    "build": ("latentedge.export.build_commands:build", "Build engines for a target.", "build"),
    "generate": ("latentedge.runtime.generate_command:generate", "Draw pictures from a bundle.", None),
    "bench": ("latentedge.benchmarks.commands:bench", "Measure a bundle on this machine.", "benchmarks"),
    "inspect": ("latentedge.runtime.inspect:inspect", "Show what is in a bundle.", None),
    "verify": ("latentedge.runtime.verify:verify", "Check a bundle's files and its recorded results.", None),
    "doctor": ("latentedge.runtime.doctor:doctor", "Show what this machine can run.", None),
    "compare": ("latentedge.calibration.commands:compare", "Compare two bundles or variants.", "calibration"),
}


class LazyGroup(click.Group):
    """A group that imports a command's module when it is called, not to list it."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Every command, in the order of the table."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command ``cmd_name``, loaded; ``None`` if there is none."""
        if cmd_name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[cmd_name][0].partition(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list of commands, without importing any of them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text, _) in COMMANDS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="latentedge")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
@click.pass_context
def cli(context: click.Context, debug: bool) -> None:
    """Trained latent diffusion models on edge devices: export, prove, quantise, build and draw."""
    context.obj = {"debug": debug}


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line: exit code 0 done, 1 failed, 2 used wrongly, 130 interrupted."""
    arguments = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    sys.exit(run(arguments, debug=debug))


def run(arguments: list[str], *, debug: bool) -> int:
    """Run one command line and give its exit code; messages go to stderr."""
    try:
        code: Any = cli.main(arguments, prog_name="latentedge", standalone_mode=False)
    except click.exceptions.Abort:
        click.echo("interrupted", err=True)
        return 130
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except ModuleNotFoundError as error:
        if debug or error.name is None or error.name.startswith("latentedge"):
            raise
        command = next((argument for argument in arguments if argument in COMMANDS), "latentedge")
        extra = COMMANDS[command][2] if command in COMMANDS else None
        missing = MissingDependencyError(
            f"`latentedge {command}` needs the Python package {error.name}, which is not installed.",
            hint=f"pip install 'latentedge[{extra}]'" if extra else f"pip install {error.name}",
        )
        click.echo(f"error: {missing}", err=True)
        return missing.exit_code
    except (LatentEdgeError, OSError, MemoryError) as error:
        if debug:
            traceback.print_exc()
        click.echo(f"error: {describe(error)}", err=True)
        return error.exit_code if isinstance(error, LatentEdgeError) else 1
    return code if isinstance(code, int) else 0


def describe(error: BaseException) -> str:
    """An error as the user reads it: one paragraph, then the hint."""
    if isinstance(error, MemoryError):
        return f"out of memory{f': {error}' if str(error) else ''}\n\nhint: try --low-memory, or a smaller picture"
    if isinstance(error, OSError):
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        hint = "free space on that disk" if full else "see that its folder exists and that you may read and write there"
        return f"{error}\n\nhint: {hint}"
    return str(error)

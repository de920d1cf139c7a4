"""Help of a command with many options: they stand under headings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import click


class SectionedCommand(click.Command):
    """A command whose help lists its options by heading; ``sections`` holds the parameters' names."""

    def __init__(self, *arguments: Any, sections: Mapping[str, Sequence[str]], **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.sections = sections

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The options by heading, and those without one, such as ``--help``, at the end."""
        parameters = {each.name: each for each in self.get_params(ctx) if isinstance(each, click.Option)}
        named = {name for names in self.sections.values() for name in names}
        others = [name for name in parameters if name not in named]
        for heading, names in {**self.sections, "Other": others}.items():
            with formatter.section(heading):
                records = (parameters[name].get_help_record(ctx) for name in names)
                formatter.write_dl([record for record in records if record is not None])

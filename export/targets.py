"""What a target's engines take: the table ``targets.json``, read and checked."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from latentedge.runtime.errors import UsageError
from latentedge.runtime.structured import structure

DEFAULT_TARGET = "generic"


@dataclass(frozen=True)
class Target:
    """Opset and operators of the graphs that a target takes."""

    name: str
    description: str
    #: Newest opset that every engine of this target parses.
    opset: int
    #: Group normalization as one node (opset 21), or as Reshape and InstanceNormalization.
    group_normalization: bool
    #: Operators of the standard domain that must not be in a graph.
    refused: tuple[str, ...]


@cache
def targets() -> dict[str, Target]:
    """Every target of the table, by name."""
    table = json.loads(Path(__file__).with_name("targets.json").read_text(encoding="utf-8"))
    return {name: structure(Target, {"name": name, **row}, f"targets.json {name}") for name, row in table.items()}


def target(name: str) -> Target:
    """The target ``name``; :class:`UsageError` lists them where there is none."""
    if name not in targets():
        raise UsageError(f"there is no target {name!r}; choose one of: {', '.join(targets())}.")
    return targets()[name]

"""A backend and its settings in one text, wherever a backend is named: ``tensorrt:cuda_graph=on,device=1``.

The same settings are fields of :class:`~latentedge.runtime.engines.base.EngineOptions`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

from latentedge.runtime.engines import registered
from latentedge.runtime.engines.base import EngineOptions
from latentedge.runtime.errors import UsageError


def parse_backend(text: str, options: EngineOptions) -> tuple[str, EngineOptions]:
    """The backend's name, and ``options`` with what ``text`` says after the colon.

    :class:`UsageError` for a setting that this backend does not have, and for a value that cannot be read.
    """
    name, colon, rest = text.partition(":")
    if not colon:
        return name, options
    known = () if name == "auto" else registered(name).settings
    changes: dict[str, Any] = {}
    for entry in rest.split(","):
        key, equals, value = (part.strip() for part in entry.partition("="))
        if not (equals and key in known):
            choices = f"it has: {', '.join(f'{name}={VALUES[name][1]}' for name in known)}" if known else "it has none"
            raise UsageError(f"the backend {name!r} has no setting {entry!r}; {choices}.")
        read, form = VALUES[key]
        try:
            changes[key] = read(value)
        except (KeyError, ValueError) as error:
            raise UsageError(f"the setting {key} is {form}, found {value!r}.") from error
    return name, dataclasses.replace(options, **changes)


def listed_backends(text: str) -> list[str]:
    """``"onnxruntime,tensorrt:device=1,cuda_graph=on"`` as two backends: a setting belongs to the one before it."""
    return [part.strip() for part in re.split(r",(?!\s*\w+=)", text) if part.strip()]


def _switch(value: str) -> bool:
    return {"on": True, "off": False}[value]


def _device(value: str) -> str:
    if not re.fullmatch(r"\d+|[a-z]+(:\d+)?", value):
        raise ValueError(value)
    return f"gpu:{value}" if value.isdigit() else value


def _count(value: str) -> int:
    if int(value) < 1:
        raise ValueError(value)
    return int(value)


#: How a setting's value is read, and what it looks like.
VALUES: dict[str, tuple[Callable[[str], Any], str]] = {
    "device": (_device, "1 or gpu:1 or cpu"),
    "cuda_graph": (_switch, "on or off"),
    "threads": (_count, "1 or more"),
}

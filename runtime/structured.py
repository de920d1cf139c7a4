"""JSON data as dataclasses, with every field's type checked."""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any, TypeVar

from latentedge.runtime.errors import BundleError

Structured = TypeVar("Structured")


def structure(kind: type[Structured], data: Any, where: str) -> Structured:
    """Build ``kind`` (a dataclass, container or plain type) from JSON data; :class:`BundleError` names what is off."""
    return typing.cast("Structured", _structure(kind, data, where))


def _structure(kind: Any, data: Any, where: str) -> Any:
    origin = typing.get_origin(kind)
    if kind is Any:
        return data
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return _structure_dataclass(kind, data, where)
    if origin in (typing.Union, types.UnionType):
        return _structure_union(typing.get_args(kind), data, where)
    if origin is tuple:
        return _structure_tuple(typing.get_args(kind), data, where)
    if origin is dict:
        value_kind = typing.get_args(kind)[1]
        return {
            key: _structure(value_kind, value, f"{where}.{key}") for key, value in _expect(dict, data, where).items()
        }
    if kind is float and isinstance(data, int) and not isinstance(data, bool):
        return float(data)
    return _expect(kind, data, where)


def _structure_dataclass(kind: type, data: Any, where: str) -> Any:
    _expect(dict, data, where)
    hints = typing.get_type_hints(kind)
    unknown = [key for key in data if key not in hints]
    if unknown:
        raise BundleError(f"the manifest's {where or 'top level'} has unknown fields: {', '.join(unknown)}.")
    values = {key: _structure(hints[key], value, f"{where}.{key}".lstrip(".")) for key, value in data.items()}
    try:
        return kind(**values)
    except TypeError as error:
        raise BundleError(f"the manifest's {where or 'top level'} is incomplete: {error}.") from error


def _structure_union(kinds: tuple[Any, ...], data: Any, where: str) -> Any:
    if data is None and type(None) in kinds:
        return None
    errors = []
    for kind in kinds:
        if kind is type(None):
            continue
        try:
            return _structure(kind, data, where)
        except BundleError as error:
            errors.append(error)
    raise errors[0]


def _structure_tuple(kinds: tuple[Any, ...], data: Any, where: str) -> tuple[Any, ...]:
    items = list(data) if isinstance(data, tuple) else _expect(list, data, where)
    if len(kinds) == 2 and kinds[1] is Ellipsis:
        return tuple(_structure(kinds[0], item, f"{where}[{index}]") for index, item in enumerate(items))
    if len(items) != len(kinds):
        raise BundleError(f"the manifest's {where} has {len(items)} entries, expected {len(kinds)}.")
    return tuple(
        _structure(kind, item, f"{where}[{i}]") for i, (kind, item) in enumerate(zip(kinds, items, strict=True))
    )


def _expect(kind: type, data: Any, where: str) -> Any:
    if not isinstance(data, kind) or (isinstance(data, bool) and kind is not bool):
        raise BundleError(f"the manifest's {where or 'top level'} is {type(data).__name__}, expected {kind.__name__}.")
    return data

"""Every configuration key with its type, default and meaning, read off the dataclasses:

for help texts, the reference and error messages.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import types
import typing
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from oxyray.config import Config

REQUIRED = object()
_ABOUT = re.compile(r"^(\w+): (.+(?:\n[ ]+\S.*)*)$", re.M)  # what is indented below goes on with it


@dataclass(frozen=True)
class Key:
    """`name` is dotted (`model.width`); `default` is REQUIRED where there is none; `open` keys are mappings that take keys of their own."""

    name: str
    kind: str
    default: Any
    about: str
    open: bool = False

    @property
    def group(self) -> str:
        return self.name.rpartition(".")[0]


@cache
def keys() -> tuple[Key, ...]:
    """All keys, in the order of the dataclasses."""
    return tuple(_walk(Config, ""))


def groups() -> dict[str, str]:
    """Each group of keys (`model`, `train.optim`) with the first sentence on it."""
    return {name: _first(cls) for name, cls in _classes(Config, "")}


def abouts(cls: type) -> dict[str, str]:
    """What the docstrings of a class and of those that it extends say as `key: what it means`."""
    docs = [inspect.cleandoc(base.__doc__ or "") for base in reversed(cls.__mro__)]
    return {m[1]: " ".join(m[2].split()) for doc in docs for m in _ABOUT.finditer(doc)}


def _walk(cls: type, where: str, made: Any = REQUIRED) -> typing.Iterator[Key]:
    """`made` is the default of the whole group, whose values need not be those of its class."""
    hints, about = typing.get_type_hints(cls), abouts(cls)
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        default = _default(field) if made is REQUIRED else getattr(made, field.name)
        if dataclasses.is_dataclass(hint):
            yield from _walk(typing.cast(type, hint), f"{where}{field.name}.", default)
            continue
        yield Key(where + field.name, _kind(hint), default, about.get(field.name, ""), typing.get_origin(hint) is dict)


def _classes(cls: type, where: str) -> typing.Iterator[tuple[str, type]]:
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint):
            yield where + field.name, typing.cast(type, hint)
            yield from _classes(typing.cast(type, hint), f"{where}{field.name}.")


def _first(cls: type) -> str:
    paragraph = (inspect.getdoc(cls) or "").split("\n\n")[0].replace("\n", " ")
    return paragraph.split(". ")[0].rstrip(".")


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else REQUIRED


def _kind(hint: Any) -> str:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return " | ".join(map(str, args))
    if origin in (typing.Union, types.UnionType):
        return " | ".join("null" if a is type(None) else _kind(a) for a in args)
    if origin is tuple:
        return f"list of {_kind(args[0])}"
    if origin is dict:
        return f"mapping to {_kind(args[1])}"
    return {str: "text", int: "whole number", float: "number", bool: "true | false"}.get(hint, str(hint))

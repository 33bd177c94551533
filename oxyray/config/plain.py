"""Plain values to dataclasses and back, with every key and type checked."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from typing import Any, Literal, TypeVar

from oxyray.errors import ConfigError

T = TypeVar("T")
_WORDS: dict[type, str] = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def need(ok: bool, key: str, why: str) -> None:
    """Raises ConfigError about `key` unless `ok`. A key that begins with a dot is one of a group that stands in several places; `from_dict`
    says in which."""
    if not ok:
        raise ConfigError(f"{key}: {why}")


def set_dotted(values: dict[str, Any], key: str, value: Any) -> None:
    """Set `key`, dotted, in nested plain values; what is not there is made."""
    *path, last = key.split(".")
    for part in path:
        values = values.setdefault(part, {})
    values[last] = value


def from_dict(cls: type[T], values: dict[str, Any], where: str = "") -> T:
    """Build dataclass `cls` from plain values, checking every key and type.

    Raises ConfigError naming the key (`where` is its dotted prefix), what came, what was expected and, for an unknown key, the nearest
    known one.
    """
    hints = typing.get_type_hints(cls)
    known = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            raise ConfigError(
                f"{where}{key}: no such key"
                + (f"; did you mean {where}{near[0]}?" if near else f"; known here: {', '.join(sorted(known))}")
            )
    for name, spec in known.items():
        if name not in values and spec.default is dataclasses.MISSING and spec.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{where}{name}: missing, and it has no default")
    converted = {key: _convert(value, hints[key], f"{where}{key}") for key, value in values.items()}
    try:
        return cls(**converted)
    except ConfigError as error:
        if str(error).startswith("."):
            raise ConfigError(f"{where.removesuffix('.')}{error}") from None
        raise


def to_dict(config: Any) -> dict[str, Any]:
    """Plain values (JSON-able) of a config dataclass."""
    return typing.cast(dict[str, Any], _plain(dataclasses.asdict(config)))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def _convert(value: Any, hint: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise ConfigError(f"{where}: expected a group of keys, got {value!r}")
        return from_dict(typing.cast(type, hint), value, where + ".")
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        return _convert(value, next(a for a in args if a is not type(None)), where)
    if origin is Literal:
        if value not in args:
            raise ConfigError(f"{where}: expected one of {', '.join(map(str, args))}, got {value!r}")
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)) or (args[-1] is not Ellipsis and len(value) != len(args)):
            raise ConfigError(f"{where}: expected a list{'' if args[-1] is Ellipsis else f' of {len(args)}'}, got {value!r}")
        inner = [args[0]] * len(value) if args[-1] is Ellipsis else list(args)
        return tuple(_convert(v, a, f"{where}[{i}]") for i, (v, a) in enumerate(zip(value, inner, strict=True)))
    if origin is dict:
        if not isinstance(value, dict):
            raise ConfigError(f"{where}: expected a mapping, got {value!r}")
        return {str(k): _convert(v, args[1], f"{where}.{k}") for k, v in value.items()}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is str and isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, hint) or (hint in (int, float) and isinstance(value, bool)):
        raise ConfigError(f"{where}: expected {_WORDS.get(hint, hint.__name__)}, got {value!r}")
    return value

"""Checks of a config's values: each is held against its field's type, the same in a file and in a call."""

from __future__ import annotations

import dataclasses
import functools
import types
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

# What int32 and float32 hold: positions, token ids and sizes are the one in the model, rates and factors the other.
LARGEST_INT = 2**31 - 1
LARGEST_FLOAT = 3.4028234e38


class ConfigError(ValueError):
    """A config that is refused: which field, what was found, what is accepted."""


@functools.cache
def field_types(kind: type) -> dict[str, Any]:
    """The type of each field of a dataclass, by name."""
    hints = get_type_hints(kind, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def shown(given: Any) -> str:
    """A value for a message, cut short where it is long."""
    try:
        text = repr(given)
    except (ValueError, RecursionError):  # an int of more digits than Python prints; a list within itself
        return f"a {type(given).__name__} too long to print"
    return text if len(text) <= 120 else text[:120] + "..."


def checked(name: str, given: Any, kind: Any) -> Any:
    """A value as a field of that type holds it.

    Args:
        name: the field, for the message.
        given: what stands there.
        kind: int, float, bool, str, a Literal of strings, a dataclass, a tuple of these, a mapping of names to them, None, or
            a union of them; Annotated[int, n] is an int of at most n.

    Returns:
        The value; a list has become a tuple, and an int a float where a float is meant. A bool stands for nothing else.

    Raises:
        ConfigError: a value of another type, or a number that is not finite or beyond int32 or float32.
    """
    options = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
    for option in options:
        largest = LARGEST_INT
        if get_origin(option) is Annotated:
            option, largest = get_args(option)
        if option is Any:
            return given
        if get_origin(option) is Mapping and isinstance(given, Mapping):
            return {key: checked(f"{name}.{key}", value, get_args(option)[1]) for key, value in given.items()}
        if get_origin(option) is tuple and isinstance(given, list | tuple) and _fits(given, option):
            return tuple(checked(f"{name}[{at}]", item, get_args(option)[0]) for at, item in enumerate(given))
        if get_origin(option) is Literal and isinstance(given, str):
            return given
        if option is float and isinstance(given, int | float) and not isinstance(given, bool):
            if not abs(given) <= LARGEST_FLOAT:
                raise ConfigError(f"{name} is {shown(given)}: accepted is a finite number of at most {LARGEST_FLOAT:.2g}")
            return float(given)
        if option is int and isinstance(given, int) and not isinstance(given, bool):
            if abs(given) > largest:
                raise ConfigError(f"{name} is {shown(given)}: accepted is at most {largest}")
            return given
        if isinstance(option, type) and option not in (int, float) and get_origin(option) is None and isinstance(given, option):
            return given
    raise ConfigError(f"{name} is {shown(given)}: accepted is {' or '.join(_told(option) for option in options)}")


def _fits(given: list[Any] | tuple[Any, ...], kind: Any) -> bool:
    return ... in get_args(kind) or len(given) == len(get_args(kind))


def _told(kind: Any) -> str:
    if kind is type(None):
        return "None"
    if get_origin(kind) is Annotated:
        return _told(get_args(kind)[0])
    if get_origin(kind) is Mapping:
        return "a table"
    if get_origin(kind) is tuple:
        count = "" if ... in get_args(kind) else f"{len(get_args(kind))} "
        return f"a list of {count}{_told(get_args(kind)[0])}"
    return "str" if get_origin(kind) is Literal else kind.__name__


def check_fields(table: Any) -> None:
    """Hold each field of a frozen dataclass against its type, and put there what `checked` makes of it."""
    for name, kind in field_types(type(table)).items():
        given = getattr(table, name)
        value = checked(name, given, kind)
        if value is not given:
            object.__setattr__(table, name, value)  # frozen for everyone else


def at_least(table: Any, least: float, names: Iterable[str]) -> None:
    """Refuse a field below a number; None is left alone."""
    for name in names:
        given = getattr(table, name)
        if given is not None and given < least:
            raise ConfigError(f"{name} is {shown(given)}: accepted is a number of at least {least}")


def above(table: Any, bound: float, names: Iterable[str]) -> None:
    """Refuse a field, or an element of one, that is not above a number; None is left alone."""
    for name in names:
        given = getattr(table, name)
        for value in given if isinstance(given, tuple) else (given,):
            if value is not None and not value > bound:
                raise ConfigError(f"{name} is {shown(given)}: accepted is a number above {bound:g}")

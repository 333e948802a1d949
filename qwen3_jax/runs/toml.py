"""A run's file and the ones that it extends, with the line that every value stands in."""

import dataclasses
import difflib
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qwen3_jax.checks import ConfigError

Path_ = tuple[str, ...]


class RunError(ConfigError):
    """A run that is refused: which file, line and key, what was found, what is accepted."""


@dataclasses.dataclass(frozen=True)
class Found:
    """A value as somebody gave it.

    Attributes:
        value: as TOML reads it.
        origin: "FILE:LINE", or "command line".
        word: as it stood on the command line; None in a file, and where it was TOML's table.
    """

    value: Any
    origin: str
    word: str | None = None


def read_run(path: Path) -> dict[Path_, Found]:
    """The values of a run's file over those of the files it extends.

    Args:
        path: the file; `extends = "other.toml"`, or a list of them, is read first and named from the file's own folder.

    Returns:
        Value by key, outermost section first. Arrays and empty tables are values.

    Raises:
        RunError: a file that is not there, is no TOML, or extends itself.
    """
    return _read(path, ())


def _read(path: Path, above: tuple[Path, ...]) -> dict[Path_, Found]:
    place = path.resolve()
    if place in above:
        raise RunError(f"{path}: extends itself, by way of {' -> '.join(each.name for each in (*above, place))}")
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise RunError(f"{path}: {error.strerror or error}: accepted is a run's TOML file") from error
    except UnicodeDecodeError as error:
        raise RunError(f"{path}: byte {error.start} is not UTF-8: accepted is a run's TOML file") from error
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RunError(f"{path}: {error}") from error
    lines = _lines(text)
    values: dict[Path_, Found] = {}
    bases = table.pop("extends", ())
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list | tuple) or not all(isinstance(base, str) for base in bases):
        raise RunError(f"{path}:{lines['extends',]}: extends is {bases!r}: accepted is a file's name, or a list of them")
    for base in bases:
        values.update(_read(path.parent / base, (*above, place)))
    values.update({key: Found(value, f"{path}:{lines.get(key, 1)}") for key, value in leaves(table)})
    return values


def leaves(table: dict[str, Any], above: Path_ = ()) -> list[tuple[Path_, Any]]:
    """The values of nested tables, each by its whole key; an empty table is a value.

    Args:
        table: nested dicts.
        above: keys that they stand under.

    Returns:
        Key and value, in the tables' order.
    """
    found: list[tuple[Path_, Any]] = []
    for name, value in table.items():
        found += leaves(value, (*above, name)) if isinstance(value, dict) and value else [((*above, name), value)]
    return found


def unknown(at: Path_, name: str, known: Sequence[str]) -> str:
    """What is said of a key that there is none of.

    Args:
        at: the section's own key.
        name: of the key in it.
        known: the section's keys.

    Returns:
        The sentence: the key, the nearest one that is known, and all of them.
    """
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    meant = f"did you mean {'.'.join((*at, nearest[0]))}? " if nearest else ""
    return f"unknown key {'.'.join((*at, name))}: {meant}accepted are {', '.join(known)}"


def _lines(text: str) -> dict[Path_, int]:
    """The line that each key begins in: of a value over several lines, the parser takes the text up to it but not beyond."""
    lines, begun = text.splitlines(), 1
    known: dict[Path_, int] = {}
    for count in range(1, len(lines) + 1):
        try:
            table = tomllib.loads("\n".join(lines[:count]) + "\n")
        except tomllib.TOMLDecodeError:
            continue  # in the middle of a value
        for key, _ in leaves(table):
            known.setdefault(key, begun if lines[begun - 1].strip() else count)
        begun = count + 1
    return known

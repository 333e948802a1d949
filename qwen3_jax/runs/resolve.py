"""A run out of its files and the command line, and where each of its values came from."""

import dataclasses
import tomllib
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from qwen3_jax.checks import ConfigError, checked, field_types
from qwen3_jax.runs.contradictions import Contradiction, check_run
from qwen3_jax.runs.models import check_field
from qwen3_jax.runs.schema import Run
from qwen3_jax.runs.sections import section_of
from qwen3_jax.runs.toml import Found, Path_, RunError, leaves, read_run, unknown

DEFAULT = "default"
MODEL_CONFIG = ("model", "config")  # whose keys are not the schema's, but Qwen3Config's


@dataclasses.dataclass(frozen=True)
class Resolved:
    """A run, and the origin of each value.

    Attributes:
        run: the run.
        origins: key -> "FILE:LINE", "command line" or "default", in the schema's order.
    """

    run: Run
    origins: dict[Path_, str]

    def value(self, key: Path_) -> Any:
        """The value of a key."""
        value: Any = self.run
        for name in key:
            value = value[name] if isinstance(value, Mapping) else getattr(value, name)
        return value


def resolve(path: Path | str, words: Sequence[str] = ()) -> Resolved:
    """Read a run.

    Args:
        path: its TOML file.
        words: of the command line: `--section.key value` or `--section.key=value`, the value as TOML writes it; what is no
            TOML is a string, and so is whatever stands where a string is wanted.

    Returns:
        The run, each value the last one given: extended files, the file, the command line.

    Raises:
        RunError: an unknown key, with the nearest that is known; a value of another type; values that contradict each other.
    """
    values = read_run(Path(path))
    for key, found in overrides(words).items():
        for known in [other for other in values if other[: len(key)] == key or key[: len(other)] == other]:
            del values[known]  # a section given anew, or a key of a section that was given empty
        values[key] = found
    origins: dict[Path_, str] = {}
    run = _section(Run, values, (), origins)
    for key, found in values.items():
        if key[:2] == MODEL_CONFIG and len(key) > len(MODEL_CONFIG):
            try:
                check_field(".".join(key[len(MODEL_CONFIG) :]), found.value)
            except ConfigError as error:
                raise RunError(f"{found.origin}: {error}") from error
    try:
        check_run(run)
    except Contradiction as error:
        raise RunError("; ".join([str(error), *_told(error.keys, origins)])) from error
    return Resolved(run, origins)


def overrides(words: Sequence[str]) -> dict[Path_, Found]:
    """The values that a command line gives.

    Args:
        words: as of `resolve`.

    Returns:
        Value by key.

    Raises:
        RunError: a word that is no key, or a key without a value.
    """
    found: dict[Path_, Found] = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        name, equals, text = word.removeprefix("--").partition("=")
        if not word.startswith("--") or not name:
            raise RunError(f"{word!r} on the command line: accepted are --section.key value and --section.key=value")
        if not equals:
            if not rest:
                raise RunError(f"{word} on the command line has no value: accepted is --{name} VALUE")
            text = rest.pop(0)
        key = tuple(name.split("."))
        found.update({(*key, *below): Found(value, "command line", None if below else text) for below, value in _parsed(text)})
    return found


def _parsed(text: str) -> list[tuple[Path_, Any]]:
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    return leaves(value) if isinstance(value, dict) and value else [((), value)]


def _section(kind: Any, values: dict[Path_, Found], at: Path_, origins: dict[Path_, str]) -> Any:
    """A dataclass of the values under a key."""
    known, given = field_types(kind), {}
    for key, found in values.items():
        name = key[len(at)]
        if name not in known:
            raise RunError(f"{found.origin}: {unknown(at, name, list(known))}")
    for name, wanted in known.items():
        key = (*at, name)
        below = {other: found for other, found in values.items() if other[: len(key)] == key}
        inner = section_of(wanted)
        if inner is None:
            given |= _plain(wanted, key, below, origins)
        elif inner.named:
            given[name] = _named(inner.kind, key, below, origins)
        elif below or not _optional(wanted):
            given[name] = _section(inner.kind, _nested(below, key), key, origins)
        else:
            origins[key] = DEFAULT
    return kind(**given)


def _plain(wanted: Any, key: Path_, below: dict[Path_, Found], origins: dict[Path_, str]) -> dict[str, Any]:
    """A field's value, checked; nothing where its default stands."""
    if not below:
        origins[key] = DEFAULT
        return {}
    origin = next(iter(below.values())).origin
    origins.update({other: found.origin for other, found in below.items()})
    if key in below:
        given, word = below[key].value, below[key].word
        if word is not None and not isinstance(given, str) and str in _options(wanted):
            given = word  # nan, 7 and true are words where words are wanted
    elif get_origin(wanted) is Mapping:
        given = {".".join(other[len(key) :]): found.value for other, found in below.items()}
    else:
        raise RunError(f"{origin}: {'.'.join(key)} is a table: accepted is a value")
    try:
        value = checked(".".join(key), given, wanted)
    except ConfigError as error:
        raise RunError(f"{origin}: {error}") from error
    words = [word for option in (wanted, *get_args(wanted)) if get_origin(option) is Literal for word in get_args(option)]
    if words and value is not None and value not in words:
        raise RunError(f"{origin}: {'.'.join(key)} is {value!r}: accepted are {', '.join(words)}")
    return {key[-1]: value}


def _named(kind: Any, key: Path_, below: dict[Path_, Found], origins: dict[Path_, str]) -> dict[str, Any]:
    """Sections that the reader names."""
    below = _nested(below, key)
    if not below:
        origins[key] = DEFAULT
    names = list(dict.fromkeys(other[len(key)] for other in below))
    return {
        name: _section(
            kind,
            _nested({other: found for other, found in below.items() if other[len(key)] == name}, (*key, name)),
            (*key, name),
            origins,
        )
        for name in names
    }


def _nested(below: dict[Path_, Found], key: Path_) -> dict[Path_, Found]:
    """The values under a key, which is to be a section; a section without any is empty."""
    found = below.get(key)
    if found is not None and found.value != {}:
        raise RunError(f"{found.origin}: {'.'.join(key)} is {found.value!r}: accepted is a section, [{'.'.join(key)}]")
    return {other: found for other, found in below.items() if other != key}


def _optional(wanted: Any) -> bool:
    return type(None) in get_args(wanted)


def _options(wanted: Any) -> Sequence[Any]:
    """The types of a union; else the one."""
    return get_args(wanted) if get_origin(wanted) in (Union, types.UnionType) else (wanted,)


def _told(keys: Sequence[Path_], origins: dict[Path_, str]) -> list[str]:
    return [f"{'.'.join(key)} is from {origins[key]}" for key in keys if key in origins]

"""Which fields of a section hold sections."""

import dataclasses
import types
from collections.abc import Mapping
from typing import Any, NamedTuple, Union, get_args, get_origin


class Inner(NamedTuple):
    """What a field holds.

    Attributes:
        kind: a dataclass.
        named: whether the field holds several of them, by names of the reader's.
    """

    kind: Any
    named: bool


def section_of(wanted: Any) -> Inner | None:
    """The section that a field holds.

    Args:
        wanted: the field's type.

    Returns:
        None for a plain value.
    """
    for option in get_args(wanted) if get_origin(wanted) in (Union, types.UnionType) else (wanted,):
        if dataclasses.is_dataclass(option):
            return Inner(option, False)
        if get_origin(option) is Mapping and dataclasses.is_dataclass(get_args(option)[1]):
            return Inner(get_args(option)[1], True)
    return None

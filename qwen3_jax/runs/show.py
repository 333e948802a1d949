"""A run as a table: each value, its unit, and where it came from."""

import ast
import inspect
import textwrap
from collections.abc import Iterator
from typing import Any

from rich.table import Table

from qwen3_jax.checks import field_types
from qwen3_jax.runs.resolve import Resolved
from qwen3_jax.runs.schema import Run
from qwen3_jax.runs.sections import section_of


def config_table(resolved: Resolved) -> Table:
    """Every key of a run.

    Args:
        resolved: the run.

    Returns:
        Rows of key, value as TOML writes it, and origin.
    """
    table = Table("key", "value", "from", title=resolved.run.name)
    for key, origin in resolved.origins.items():
        table.add_row(".".join(key), shown(resolved.value(key)), origin)
    return table


def keys_table() -> Table:
    """Every key that a run may have.

    Returns:
        Rows of key, default and what it says.
    """
    table = Table("key", "default", "what", title="a run's keys")
    for key, default, what in keys(Run):
        table.add_row(key, default, what)
    return table


def keys(kind: Any, above: str = "") -> Iterator[tuple[str, str, str]]:
    """The keys of a section and of those in it.

    Args:
        kind: a dataclass of qwen3_jax.runs.schema.
        above: the section's own key and a dot.

    Yields:
        Key, default as TOML writes it, and the field's docstring.
    """
    said = documented(kind)
    for name, wanted in field_types(kind).items():
        section = section_of(wanted)
        if section is None:
            yield f"{above}{name}", shown(getattr(kind(), name)), said[name]
        else:
            yield from keys(section.kind, f"{above}{name}." + ("NAME." if section.named else ""))


def shown(value: Any) -> str:
    """A value as TOML writes it; None, which TOML does not have, as a dash."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, tuple):
        return f"[{', '.join(map(shown, value))}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name} = {shown(item)}" for name, item in value.items()) + "}"
    return str(value)


def documented(kind: type) -> dict[str, str]:
    """The docstring of each field of a section, which stands below it in the source.

    Args:
        kind: a dataclass of qwen3_jax.runs.schema.

    Returns:
        Field -> what it says, in the class's order.
    """
    body = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]
    found: dict[str, str] = {}
    name = None
    for node in getattr(body, "body", []):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            name = node.target.id
            found[name] = ""
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and name is not None:
            found[name], name = str(node.value.value), None
    return found

"""jinja2 as transformers sets it up for chat templates: the sandbox, the block tags, the functions.

Imports nothing but jinja2 and the standard library: the process that renders a folder's own template must start at once.
"""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Callable, Mapping
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

MAX_SOURCE = 1_000_000  # characters of a template
_MAX_MESSAGE = 2_000  # characters of what is said about a failure


class _Generation(Extension):
    """`{% generation %}` ... `{% endgeneration %}` marks the assistant's words; it renders its content."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        """The block's own content, in a scope of its own."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_render"), [], [], body).set_lineno(line)

    def _render(self, caller: Callable[[], str]) -> str:
        return caller()


class _Namespace(Namespace):
    """jinja2's namespace without names that begin with an underscore, as transformers has it."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # no `self`: a template may have a value of that name
        values = dict(*args[1:], **kwargs)
        for name in values:
            _check_name(name)
        Namespace.__init__(args[0], values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace takes no name that begins with an underscore: {name!r}")


class _Dict:
    """`dict` as a template may use it: to call it, and `fromkeys`; the type itself stays out of reach."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        """As dict.fromkeys."""
        return dict.fromkeys(*args)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """As transformers writes it: no HTML escapes, no sorting, unicode as it is."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: Any) -> None:
    raise jinja2.exceptions.TemplateError(message)


def _strftime_now(format: Any) -> str:
    return datetime.datetime.now().strftime(format)


@functools.cache
def _environment() -> ImmutableSandboxedEnvironment:
    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    env.filters["tojson"] = _tojson
    names: dict[str, Any] = {
        "raise_exception": _raise,
        "strftime_now": _strftime_now,
        "dict": _Dict(),
        "namespace": _Namespace,
    }
    env.globals |= names
    return env


@functools.lru_cache(maxsize=16)
def _compiled(source: str) -> jinja2.Template:
    if len(source) > MAX_SOURCE:
        raise jinja2.exceptions.TemplateError(f"it has {len(source):,} characters; accepted are {MAX_SOURCE:,}")
    return _environment().from_string(source)


def text_of(source: str, values: Mapping[str, Any]) -> str:
    """A template's text for these values, without any bound on time or memory.

    Args:
        source: jinja2.
        values: what the template reads, by name.

    Returns:
        The text.

    Raises:
        Exception: whatever the template brings about; `failure` says it.
    """
    return _compiled(source).render(values)


def failure(error: Exception) -> str:
    """One sentence on what a template brought about.

    Args:
        error: what text_of raised.

    Returns:
        It names the template as the culprit.
    """
    if isinstance(error, jinja2.TemplateSyntaxError):
        said = f"the chat template is no jinja2: {error}"
    elif isinstance(error, jinja2.TemplateError):  # its own words, if it is raise_exception's
        said = f"the chat template failed: {error}"
    else:
        said = f"the chat template failed: {type(error).__name__}: {error}"
    return said if len(said) <= _MAX_MESSAGE else f"{said[:_MAX_MESSAGE]} ..."

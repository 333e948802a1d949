"""Chat templates: jinja2 in a sandbox, with the options that transformers sets, in bounded time, output and memory.

A template comes with a checkpoint, so it is somebody else's program. jinja2's sandbox keeps it from Python's objects but bounds
neither loops nor strings; here every step of a loop, every call and every join counts against a budget.
"""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from jinja2.visitor import NodeTransformer

MAX_STEPS = 200_000  # turns of loops and calls in one rendering
MAX_OUTPUT = 32_000_000  # characters of one rendering, and of any string made on the way


class TemplateError(ValueError):
    """A template that is refused or that failed; the message says why."""


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


class _Budget:
    """What one rendering may still spend."""

    def __init__(self) -> None:
        self.steps = MAX_STEPS
        self.characters = MAX_OUTPUT

    def step(self, count: int = 1) -> None:
        self.steps -= count
        if self.steps < 0:
            raise TemplateError(f"the chat template runs on after {MAX_STEPS:,} steps")

    def make(self, characters: int) -> None:
        self.characters -= characters
        if self.characters < 0:
            raise TemplateError(f"the chat template makes more than {MAX_OUTPUT:,} characters")


def _counted(items: Iterable[Any]) -> Iterator[Any]:
    """A loop's items, each of them a step."""
    budget = _current.get()
    for item in items:
        budget.step()
        yield item


# The budget of the rendering under way in this thread.
_current: ContextVar[_Budget] = ContextVar("template_budget")


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox, with operators and calls that count."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def _generate(self, source: nodes.Template, *args: Any, **kwargs: Any) -> str:
        """Compile the tree after it was metered."""
        return super()._generate(_Metered().visit(source), *args, **kwargs)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """An arithmetic operator, refused before it makes something huge."""
        budget = _current.get()
        budget.step()
        if operator == "**":
            raise SecurityError("the power operator is no part of a chat template")
        if operator == "*":
            for text, times in ((left, right), (right, left)):
                if isinstance(text, str | list | tuple) and isinstance(times, int):
                    budget.make(len(text) * max(times, 0))
            if isinstance(left, int) and isinstance(right, int) and left.bit_length() + right.bit_length() > 256:
                raise SecurityError("a number beyond 256 bits is no part of a chat template")
        elif operator == "+" and isinstance(left, str | list | tuple) and isinstance(right, str | list | tuple):
            budget.make(len(left) + len(right))
        elif operator == "%" and isinstance(left, str):
            raise SecurityError("string formatting with % is no part of a chat template")
        return super().call_binop(context, operator, left, right)

    def call(self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """A call of a macro or method; those that make long strings out of short ones are refused."""
        budget = _current.get()
        budget.step()
        owner, name = getattr(__obj, "__self__", None), getattr(__obj, "__name__", "")
        if isinstance(owner, str):
            if name in ("center", "ljust", "rjust", "zfill", "expandtabs", "translate"):
                raise SecurityError(f"str.{name} is no part of a chat template")
            budget.make(len(owner))
            if name == "replace":
                _make_replaced(owner, *args)
            if name in ("split", "rsplit", "splitlines"):
                budget.step(len(owner))  # at most so many parts
            if name == "join":
                args = (list(_counted(args[0])),)
                budget.make(sum(len(str(item)) + len(owner) for item in args[0]))
        return super().call(__context, __obj, *args, **kwargs)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """str.format pads without bound and reads attributes: refused where a template takes hold of it."""
        if super().wrap_str_format(value) is not None:
            raise SecurityError("str.format is no part of a chat template")
        return None


class _Metered(NodeTransformer):
    """Wraps what every `for` goes over in `_counted`, and every `~` in `_joined`."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        """A loop over counted items."""
        self.generic_visit(node)
        node.iter = nodes.Filter(node.iter, "_counted", [], [], None, None, lineno=node.lineno)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        """A concatenation by `~`, its parts added up first."""
        self.generic_visit(node)
        parts = nodes.List(node.nodes, lineno=node.lineno)
        return nodes.Filter(parts, "_joined", [], [], None, None, lineno=node.lineno)


def _joined(parts: list[Any]) -> str:
    texts = [str(part) for part in parts]
    _current.get().make(sum(map(len, texts)))
    return "".join(texts)


def _make_replaced(text: str, old: str = "", new: str = "", count: int = -1) -> None:
    """Pays for `text.replace(old, new, count)` before it is made."""
    times = text.count(old) if old else len(text) + 1
    times = times if count is None or count < 0 else min(times, count)
    _current.get().make(len(text) + times * max(len(new) - len(old), 0))


def _replace(text: Any, old: str, new: str, count: int | None = None) -> str:
    text, old, new = str(text), str(old), str(new)
    _make_replaced(text, old, new, -1 if count is None else count)
    return text.replace(old, new, -1 if count is None else count)


def _measured(function: Callable[..., Any], parts: bool = False) -> Callable[..., Any]:
    """A filter of jinja2 whose result counts as made; with `parts` it may make a list of a text."""

    @functools.wraps(function)
    def measured(*args: Any, **kwargs: Any) -> Any:
        # A text's letters may each become an item.
        _current.get().step(1 + sum(len(item) for item in args if isinstance(item, str | list | tuple)) if parts else 1)
        result = function(*args, **kwargs)
        if isinstance(result, str):
            _current.get().make(len(result))
        return result

    return measured


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As transformers writes it: no HTML escapes, no sorting, unicode as it is."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _range(*bounds: int) -> list[int]:
    items = range(*bounds)
    for _ in range(min(len(items), MAX_STEPS + 1)):
        _current.get().step()
    return list(items)


# The filters that a chat template has use for; the rest can pad, wrap or repeat without bound.
_FILTERS = (
    "abs capitalize count d default dictsort e escape first float int items join last length list lower map max min reject "
    "rejectattr reverse round safe select selectattr sort string sum title trim unique upper"
).split()
_LISTING = ("dictsort", "items", "list", "reverse", "sort", "unique")


@functools.cache
def _environment() -> _Environment:
    env = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    env.filters = {name: _measured(env.filters[name], parts=name in _LISTING) for name in _FILTERS}
    env.filters |= {"replace": _replace, "tojson": _measured(_tojson), "_counted": _counted, "_joined": _joined}
    names: dict[str, Any] = {
        "range": _range,
        "dict": dict,
        "namespace": env.globals["namespace"],
        "raise_exception": _raise,
        "strftime_now": _strftime_now,
    }
    env.globals = names
    return env


@functools.lru_cache(maxsize=32)
def _compiled(source: str) -> jinja2.Template:
    if len(source) > 1_000_000:
        raise TemplateError(f"the chat template has {len(source):,} characters; accepted are 1,000,000")
    try:
        return _environment().from_string(source)
    except (jinja2.TemplateSyntaxError, RecursionError) as error:
        raise TemplateError(f"the chat template is no jinja2: {error}") from error


def render(source: str, values: Mapping[str, Any]) -> str:
    """A template's text for these values.

    Args:
        source: jinja2.
        values: `messages`, `tools`, `add_generation_prompt` and what else the template reads. Plain JSON values.

    Returns:
        The text, byte for byte what transformers' apply_chat_template gives.

    Raises:
        TemplateError: no jinja2, something that a template may not do, an error that it raises itself, or a budget spent.
    """
    template = _compiled(source)
    budget = _Budget()
    outer = _current.set(budget)
    try:
        pieces = []
        for piece in template.generate(**values):
            budget.make(len(piece))
            pieces.append(piece)
        return "".join(pieces)
    except (
        jinja2.TemplateError,
        TypeError,
        ZeroDivisionError,
        OverflowError,
        RecursionError,
        AttributeError,
        KeyError,
    ) as error:
        raise TemplateError(f"the chat template failed: {error}") from error
    finally:
        _current.reset(outer)


# Names that a message's reasoning goes by; the first is what Qwen3's templates read.
_REASONING = ("reasoning_content", "thinking", "reasoning")


def normal_form(messages: Iterable[Any]) -> list[dict[str, Any]]:
    """Messages as transformers 5 hands them to a template: no key with a null, and reasoning under the name that is read.

    Args:
        messages: of a conversation, objects; left as they are.

    Returns:
        New ones.

    Raises:
        TemplateError: a message that is no object.
    """
    normal = []
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise TemplateError(f"messages[{number}] is {type(message).__name__}: accepted is an object with role and content")
        filled = {key: value for key, value in message.items() if value is not None}
        reasoning = next((filled[name] for name in _REASONING if name in filled), None)
        if reasoning is not None:
            filled = {"thinking": reasoning, **filled, "reasoning_content": reasoning}
        normal.append(filled)
    return normal

"""Chat templates: from a conversation to the text that a model reads, as transformers renders it."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from qwen3_jax.chat.environment import failure, text_of
from qwen3_jax.chat.family import TEMPLATES, family_template
from qwen3_jax.chat.renderer import RenderingError, render_apart

# The hybrid checkpoints' own template as published, by its sha256: it is known to do what the family's does.
_PUBLISHED = frozenset({"a55ee1b1660128b7098723e0abcd92caa0788061051c62d51cbe87d9cf1974d8"})


class TemplateError(ValueError):
    """A template that is refused or that failed; the message says why."""


def render(source: str, values: Mapping[str, Any]) -> str:
    """A template's text for these values.

    A family's template, or the published one, is rendered here. Any other is somebody else's program: it runs in a process of
    its own, within a time and a memory that grow with the values.

    Args:
        source: jinja2.
        values: `messages`, `tools`, `add_generation_prompt` and what else the template reads. What is no JSON value becomes
            one, as transformers does it: numpy's numbers, dataclasses, pydantic's models; anything else its type's name.

    Returns:
        The text, byte for byte what transformers' apply_chat_template gives.

    Raises:
        TemplateError: no jinja2, something that a template may not do, an error that it raises itself or brings about, or
            more time, memory or text than it may take.
    """
    try:
        plain = {name: _plain(value) for name, value in values.items()}
        return text_of(source, plain) if _is_known(source) else render_apart(source, plain)
    except RenderingError as error:
        raise TemplateError(str(error)) from error
    except Exception as error:  # whatever a template brings about
        raise TemplateError(failure(error)) from error


@functools.lru_cache(maxsize=32)
def _is_known(source: str) -> bool:
    known = any(source == family_template(family) for family in TEMPLATES)
    return known or hashlib.sha256(source.encode("utf-8", "replace")).hexdigest() in _PUBLISHED


def _plain(value: Any) -> Any:
    """The value made of Python's own JSON types: no template gets hold of a method that does more."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_plain, value)) if type(value) in (list, tuple) else [_plain(item) for item in value]
    if isinstance(value, np.generic):
        return _plain(value.item())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if callable(dumped := getattr(value, "model_dump", None)):
        return _plain(dumped())
    return f"<{type(value).__name__}>"


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

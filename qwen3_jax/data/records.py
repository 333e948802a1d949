"""Records: what a line of JSON or a row must hold to become a document."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

# Fields that are read where none is named; the first that is there counts.
CHAT_FIELDS = ("messages", "conversations")
TEXT_FIELDS = ("text", "content")
ROLES = ("system", "user", "assistant", "tool")
# ShareGPT's names: {"from": "human", "value": ...}.
_OLDER_ROLES = {"human": "user", "gpt": "assistant", "function": "tool", "observation": "tool"}

_THOUGHTS = ("reasoning_content", "thinking", "reasoning")  # the names that templates' messages have for them

BROKEN, NOT_UTF8, EMPTY = "broken JSON", "not UTF-8", "empty"
NO_FIELD, NOT_TEXT, NOT_CHAT = "no known field", "no text in its field", "no conversation"


class BadRecord(ValueError):
    """A record that is passed over: what kind of fault, and what was found."""

    def __init__(self, kind: str, found: str):
        super().__init__(f"{kind}: {found}")
        self.kind = kind
        self.found = found


@dataclasses.dataclass(frozen=True)
class Conversation:
    """Messages, and the tools that they may call.

    Attributes:
        messages: objects with role, content and what else a chat template reads.
        tools: JSON schemas of functions, or None.
    """

    messages: list[dict[str, Any]]
    tools: list[Any] | None = None


def parsed(line: bytes) -> dict[str, Any]:
    """The JSON object of a line.

    Args:
        line: without its end.

    Returns:
        The object.

    Raises:
        BadRecord: nothing there, no UTF-8, no JSON, or no object.
    """
    if not line.strip():
        raise BadRecord(EMPTY, "a blank line")
    try:
        record = json.loads(text_of(line))
    except RecursionError as error:
        raise BadRecord(BROKEN, "nested too deeply") from error
    except ValueError as error:
        if isinstance(error, BadRecord):
            raise
        raise BadRecord(BROKEN, str(error)) from error
    if not isinstance(record, dict):
        raise BadRecord(BROKEN, f"a JSON {type(record).__name__} where an object is accepted")
    return record


def text_of(content: bytes) -> str:
    """Bytes as UTF-8 text.

    Raises:
        BadRecord: they are none.
    """
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRecord(NOT_UTF8, str(error)) from error


def document(record: Mapping[str, Any], field: str | None = None) -> str | Conversation:
    """What a record is about: a text or a conversation.

    Args:
        record: a JSON object, or a row by column.
        field: where it stands; None: the first of CHAT_FIELDS and TEXT_FIELDS that is there. One of CHAT_FIELDS holds a
            conversation, also where it is named here.

    Returns:
        Text that is not blank, or a conversation with an answer in it.

    Raises:
        BadRecord: no such field, nothing in it, or nothing that is accepted there.
    """
    names = (*CHAT_FIELDS, *TEXT_FIELDS) if field is None else (field,)
    name = next((name for name in names if record.get(name) is not None), None)
    if name is None:
        fields = ", ".join(map(str, list(record)[:10])) or "none"
        raise BadRecord(NO_FIELD, f"fields {fields} where {' or '.join(names)} is accepted")
    value = record[name]
    if name in CHAT_FIELDS and not isinstance(value, list):
        raise BadRecord(NOT_CHAT, f"{name} is {type(value).__name__} where a list of messages is accepted")
    if isinstance(value, str):
        return checked_text(value, name)
    if isinstance(value, list):
        return Conversation(_messages(value, name), _tools(record.get("tools")))
    raise BadRecord(NOT_TEXT, f"{name} is {type(value).__name__} where text or a list of messages is accepted")


def checked_text(text: str, name: str) -> str:
    """A text that can be tokenised.

    Args:
        text: any.
        name: its field, for the message.

    Returns:
        The text.

    Raises:
        BadRecord: blank, or with half of a surrogate pair, which JSON can spell and UTF-8 cannot.
    """
    if not text or text.isspace():
        raise BadRecord(EMPTY, f"{name} is blank")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRecord(NOT_UTF8, f"{name}: {error}") from error
    return text


def _messages(given: list[Any], name: str) -> list[dict[str, Any]]:
    if not given:
        raise BadRecord(EMPTY, f"{name} is an empty list")
    messages = []
    for at, message in enumerate(given):
        place = f"{name}[{at}]"
        if not isinstance(message, Mapping):
            raise BadRecord(NOT_CHAT, f"{place} is {type(message).__name__} where an object is accepted")
        message = {key: value for key, value in message.items() if value is not None}
        if "from" in message and "value" in message and "role" not in message:
            message = {"role": message["from"], "content": message["value"]}
        role = message.get("role")
        role = _OLDER_ROLES.get(role, role) if isinstance(role, str) else role
        if role not in ROLES:
            raise BadRecord(NOT_CHAT, f"{place}.role is {role!r} where {', '.join(ROLES)} are accepted")
        messages.append(message | {"role": role, "content": _content(message, place)})
    if all(message["role"] != "assistant" for message in messages):
        raise BadRecord(NOT_CHAT, f"{name} has no message of the assistant")
    return messages


def _content(message: Mapping[str, Any], place: str) -> str:
    content = message.get("content", "")
    if isinstance(content, list):  # parts: text alone is accepted
        texts = [part.get("text") if isinstance(part, Mapping) else None for part in content]
        if not all(isinstance(text, str) for text in texts):
            raise BadRecord(NOT_CHAT, f"{place}.content has a part that is no text")
        content = "".join(map(str, texts))
    if not isinstance(content, str):
        raise BadRecord(NOT_CHAT, f"{place}.content is {type(content).__name__} where text is accepted")
    calls = message.get("tool_calls")
    if not content.strip() and not calls and message.get("role") not in ("tool", "system"):
        raise BadRecord(EMPTY, f"{place}.content is blank")
    spoken = {"content": content, "tool_calls": json.dumps(calls, default=str) if calls else None}
    for name, text in (spoken | {name: message.get(name) for name in _THOUGHTS}).items():
        if isinstance(text, str) and text.strip():
            checked_text(text, f"{place}.{name}")
            # A message that spells the template's own marks would write turns, and losses, of its own.
            mark = next((mark for mark in ("<|im_start|>", "<|im_end|>") if mark in text), None)
            if mark is not None:
                raise BadRecord(NOT_CHAT, f"{place}.{name} has {mark} in it")
    return content


def _tools(given: Any) -> list[Any] | None:
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except ValueError as error:
            raise BadRecord(NOT_CHAT, f"tools is no JSON: {error}") from error
    if given is None or given == []:
        return None
    if not isinstance(given, list):
        raise BadRecord(NOT_CHAT, f"tools is {type(given).__name__} where a list is accepted")
    return given

"""Thinking: an answer taken apart into thought and content, whole or as it streams, and the soft switches in a conversation.

A hybrid model writes `<think>`, the thought, `</think>` and the content. Thinking-2507's prompt opens the thought, so its
answer holds `</think>` alone. Instruct-2507's has no tags. One parser reads all three; `thought_is_open` tells from the prompt
where an answer begins.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

OPEN, CLOSE = "<think>", "</think>"
_SWITCH = re.compile(r"(?<![\w/])/(no_)?think(?![\w/])")


@dataclass(frozen=True)
class Piece:
    """Some text of an answer, and which part of it that is."""

    kind: Literal["thinking", "content"]
    text: str


@dataclass(frozen=True)
class Answer:
    """An answer in its parts.

    Attributes:
        thinking: the thought, without its tags and the line breaks around them; "" where there is none.
        content: what comes after the thought and its line breaks.
        finished: False while the thought is still open: content is then "".
    """

    thinking: str
    content: str
    finished: bool


class ThinkingParser:
    """Takes an answer apart while it streams: `feed` it text cut anywhere, then `close` it.

    `<think>` counts at the answer's start alone, after white space. The first `</think>` ends the thought: what follows may
    have been shown already, so a later one is content. Line breaks next to the tags belong to neither part, as the chat
    templates have it. Without a thought the content is the answer as it stands.
    """

    def __init__(self, thinking_open: bool = False):
        """Begin an answer.

        Args:
            thinking_open: the prompt ends within a thought, as Thinking-2507's does: see thought_is_open.
        """
        self._open = thinking_open
        self._state: Literal["start", "opened", "thinking", "closed", "content", "over"] = "start"
        self._held = ""  # what cannot be told apart yet

    @property
    def finished(self) -> bool:
        """Whether the thought has ended, or there is none so far."""
        return self._state in ("closed", "content") or (self._state == "start" and not self._open)

    def feed(self, text: str) -> list[Piece]:
        """The pieces that more text makes certain.

        Args:
            text: goes on where the last one ended.

        Returns:
            Pieces with text in them, in order; thoughts first.

        Raises:
            ValueError: the parser was closed.
        """
        if self._state == "over":
            raise ValueError("the answer was closed: accepted is one parser per answer")
        self._held += text
        pieces: list[Piece] = []
        if self._state == "start":
            self._start()
        if self._state == "opened":
            self._held = self._held.lstrip("\n")
            if self._held:
                self._state = "thinking"
        if self._state == "thinking":
            self._think(pieces)
        if self._state == "closed":
            self._held = self._held.lstrip("\n")
            if self._held:
                self._state = "content"
        if self._state == "content":
            self._emit(pieces, "content", len(self._held))
        return pieces

    def close(self, cut: bool = False) -> list[Piece]:
        """What was held back, once the answer is over.

        Args:
            cut: the answer was stopped by a limit. The beginning of a tag at its end is then dropped, so that the parts are
                beginnings of what they would have become. An answer that ended by itself keeps it: it is all of its text.

        Returns:
            At most one piece.
        """
        pieces: list[Piece] = []
        if not cut and self._state == "start":
            if self._open:
                self._held = self._held.strip("\n")
            self._emit(pieces, "thinking" if self._open else "content", len(self._held))
        elif not cut and self._state == "thinking" and self._held.strip("\n"):
            self._emit(pieces, "thinking", len(self._held))
        self._held, self._state = "", "over"
        return pieces

    def _start(self) -> None:
        """Settle whether the answer begins with `<think>`, if it can be told."""
        rest = self._held.lstrip()
        if rest.startswith(OPEN):
            self._held, self._state = rest[len(OPEN) :], "opened"
        elif not OPEN.startswith(rest):
            self._state = "opened" if self._open else "content"

    def _think(self, pieces: list[Piece]) -> None:
        """Give the thought up to its end, or up to what may be its end."""
        end = self._held.find(CLOSE)
        if end >= 0:
            self._emit(pieces, "thinking", len(self._held[:end].rstrip("\n")))
            self._held, self._state = self._held.lstrip("\n")[len(CLOSE) :], "closed"
            return
        sizes = range(min(len(CLOSE) - 1, len(self._held)), 0, -1)
        partial = next((size for size in sizes if self._held.endswith(CLOSE[:size])), 0)
        self._emit(pieces, "thinking", len(self._held[: len(self._held) - partial].rstrip("\n")))

    def _emit(self, pieces: list[Piece], kind: Literal["thinking", "content"], length: int) -> None:
        if length:
            pieces.append(Piece(kind, self._held[:length]))
            self._held = self._held[length:]


def split_thinking(text: str, thinking_open: bool = False, cut: bool = False) -> Answer:
    """An answer's thought and content: what ThinkingParser makes of the whole text.

    Args:
        text: what the model wrote, its end-of-turn token left out.
        thinking_open: the prompt ends within a thought: see thought_is_open.
        cut: the answer was stopped by a limit: see ThinkingParser.close.

    Returns:
        The parts.
    """
    parser = ThinkingParser(thinking_open)
    pieces = parser.feed(text)
    finished = parser.finished
    pieces += parser.close(cut)
    parts = {kind: "".join(piece.text for piece in pieces if piece.kind == kind) for kind in ("thinking", "content")}
    return Answer(parts["thinking"], parts["content"], finished)


def thought_is_open(prompt: str) -> bool:
    """Whether a rendered prompt ends within a thought, so that the answer goes on with it.

    Args:
        prompt: the text that the chat template gave, with its generation prompt.

    Returns:
        True where the last turn is the assistant's and has a `<think>` without its `</think>`.
    """
    _, begins, turn = prompt.rpartition("<|im_start|>assistant\n")
    return bool(begins) and "<|im_end|>" not in turn and turn.rfind(OPEN) > turn.rfind(CLOSE)


def last_soft_switch(messages: Sequence[Mapping[str, Any]]) -> bool | None:
    """The soft switch that a hybrid model follows: the last `/think` or `/no_think` in what users and the system say.

    The model learned it, no template acts on it, and `enable_thinking=False` goes before it.

    Args:
        messages: a conversation.

    Returns:
        True for `/think`, False for `/no_think`, None where there is neither. A flag within a word or a path is none.
    """
    switch = None
    for message in messages:
        if message.get("role") in ("user", "system"):
            content = message.get("content")
            parts = content if isinstance(content, list) else [{"text": content}]
            for part in parts:
                text = part.get("text") if isinstance(part, Mapping) else None
                for found in _SWITCH.finditer(text if isinstance(text, str) else ""):
                    switch = found[1] is None
    return switch

"""Conversations: through the chat template to tokens, a loss on the assistant's own alone, and the soft switches of thinking.

The hybrid template shows a thought only after the last question; earlier answers stand there without, which no model writes. So
a conversation becomes as few samples as show every answer the way it was generated: one where rendering goes on from where it
was (Instruct-2507, Coder, the steps of one question), else one a question. Each answer is a target in one sample exactly.
"""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from qwen3_jax.chat.template import TemplateError
from qwen3_jax.chat.thinking import CLOSE, OPEN, last_soft_switch
from qwen3_jax.checks import check_fields
from qwen3_jax.data.files import DataError, check_choice
from qwen3_jax.data.records import NOT_CHAT, BadRecord, Conversation

OverLong = Literal["cut", "drop"]
Answers = Literal["all", "last"]
BEGIN_OF_ANSWER, END_OF_TURN = "<|im_start|>assistant\n", "<|im_end|>"


@dataclasses.dataclass(frozen=True)
class ChatConfig:
    """How conversations become samples.

    Attributes:
        flags: put `/think` and `/no_think` into questions by what their answers do (Qwen3 report, section 4.3 and table 9).
        flag_rate: how often a question gets the flag that holds anyway: the default's, or one that an earlier question set.
        max_length: tokens of a sample at most; None: any number.
        over_long: what becomes of a longer one: cut at its end, or dropped.
        answers: all, or the last one of each conversation.
        seed: of the flags; the messages go in, so that no order of work and no place of a file matters.
    """

    flags: bool = False
    flag_rate: float = 0.5
    max_length: int | None = None
    over_long: OverLong = "cut"
    answers: Answers = "all"
    seed: int = 0

    def __post_init__(self):
        check_fields(self)
        check_choice("over_long", self.over_long, OverLong)
        check_choice("answers", self.answers, Answers)
        if not 0 <= self.flag_rate <= 1:
            raise DataError(f"flag_rate is {self.flag_rate}: accepted is 0 to 1")
        if self.max_length is not None and self.max_length < 2:
            raise DataError(f"max_length is {self.max_length}: accepted is at least 2, or None")


@dataclasses.dataclass(frozen=True)
class Sample:
    """Tokens of one rendering.

    Attributes:
        ids: all of them.
        targets: whether each is the assistant's own.
        cut: whether it was longer.
    """

    ids: list[int]
    targets: list[bool]
    cut: bool = False


def samples(tokenizer: Any, conversation: Conversation, config: ChatConfig) -> tuple[list[Sample], int]:
    """The samples of a conversation.

    Args:
        tokenizer: a qwen3_jax Tokenizer, whose template shows the messages.
        conversation: messages and tools.
        config: flags and limits.

    Returns:
        Samples with a target in them, and how many were dropped: over-long ones, and those whose answers were cut off.

    Raises:
        BadRecord: a conversation that the template refuses.
        DataError: a template whose generation prompt does not begin the assistant's turn.
    """
    messages: Sequence[Mapping[str, Any]] = conversation.messages
    if config.flags:
        messages = with_flags(messages, random.Random(f"{config.seed}:{json.dumps(messages, default=str)}"), config.flag_rate)
    try:
        renderings = _renderings(tokenizer, messages, conversation.tools)
    except TemplateError as error:
        raise BadRecord(NOT_CHAT, str(error)) from error
    if config.answers == "last":
        text, spans = renderings[-1]
        renderings = [(text, spans[-1:])]
    found: list[Sample] = []
    dropped = 0
    for text, spans in renderings:
        ids, targets = _tokens(tokenizer.encode, text, spans)
        over = config.max_length is not None and len(ids) > config.max_length
        if over:
            ids, targets = ids[: config.max_length], targets[: config.max_length]
        if (over and config.over_long == "drop") or not any(targets[1:]):
            dropped += 1
        else:
            found.append(Sample(ids, targets, over))
    return found, dropped


def _renderings(
    tokenizer: Any, messages: Sequence[Mapping[str, Any]], tools: list[Any] | None
) -> list[tuple[str, list[tuple[int, int]]]]:
    """Texts, and where in each the answers stand: each answer once, as it was generated."""
    found: list[tuple[str, list[tuple[int, int]]]] = []
    for at, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        # Its first message may be the assistant's: then nothing is asked, and the prompt alone is a generation prompt.
        asked = _rendered(tokenizer, messages[:at], tools, add_generation_prompt=True) if at else BEGIN_OF_ANSWER
        told = _rendered(tokenizer, messages[: at + 1], tools)
        end = told.rfind(END_OF_TURN)
        if not told.startswith(asked) or end < len(asked):
            raise DataError(
                f"the chat template of {tokenizer.folder} does not show an answer after its generation prompt and before "
                f"{END_OF_TURN}: accepted is one that does"
            )
        span = (len(asked), end + len(END_OF_TURN))
        if found and told.startswith(found[-1][0]):
            found[-1] = (told, [*found[-1][1], span])
        else:
            found.append((told, [span]))
    return found


def _rendered(tokenizer: Any, messages: Sequence[Mapping[str, Any]], tools: Any, add_generation_prompt: bool = False) -> str:
    return tokenizer.apply_chat_template(messages, tools=tools, add_generation_prompt=add_generation_prompt, tokenize=False)


def _tokens(encode: Callable[[str], list[int]], text: str, spans: Sequence[tuple[int, int]]) -> tuple[list[int], list[bool]]:
    """Ids of a rendering, encoded span by span, for an answer's tokens come after its prompt's when it is generated."""
    ids: list[int] = []
    targets: list[bool] = []
    at = 0
    for begin, end in [*spans, (len(text), len(text))]:
        for stretch, is_answer in ((text[at:begin], False), (text[begin:end], True)):
            if stretch:
                more = encode(stretch)
                ids += more
                targets += [is_answer] * len(more)
        at = end
    return ids, targets


def with_flags(messages: Sequence[Mapping[str, Any]], draw: random.Random, rate: float) -> list[dict[str, Any]]:
    """Messages whose questions carry the soft switch that their answers follow.

    An answer without a thought is given under `/no_think`, one with a thought under `/think`, which is the default. Where
    another switch holds (or the question spells the wrong one), the right one is put after the question; where the right one
    holds already, with a chance of `rate`. The last switch wins, as the model is taught.

    Args:
        messages: with roles and contents.
        draw: where chance comes from.
        rate: of flags that are not needed.

    Returns:
        New messages; those that are no questions, or whose answers are not there, as they were.
    """
    flagged = [dict(message) for message in messages]
    for at, message in enumerate(flagged):
        if message["role"] != "user":
            continue
        answers = _answers_of(flagged, at)
        if not answers:
            continue
        thinks = any(map(_has_thought, answers))
        holds = last_soft_switch(flagged[: at + 1])
        holds = True if holds is None else holds
        chance = (
            draw.random() < rate
        )  # drawn whether or not it is needed: later questions then do not depend on this one's text
        if holds != thinks or (chance and last_soft_switch([message]) is None):
            message["content"] = f"{message['content']} {'/think' if thinks else '/no_think'}"
    return flagged


def _answers_of(messages: Sequence[Mapping[str, Any]], question: int) -> list[Mapping[str, Any]]:
    found = []
    for message in messages[question + 1 :]:
        if message["role"] == "user":
            break
        if message["role"] == "assistant":
            found.append(message)
    return found


def _has_thought(message: Mapping[str, Any]) -> bool:
    for name in ("reasoning_content", "thinking", "reasoning"):
        thought = message.get(name)
        if isinstance(thought, str):
            return bool(thought.strip())
    content = message.get("content") or ""
    return CLOSE in content and bool(content.split(CLOSE)[0].split(OPEN)[-1].strip())

"""An answer's thought and content: whole, in pieces, and cut off anywhere; the soft switches."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3_jax.chat.thinking import Answer, ThinkingParser, last_soft_switch, split_thinking, thought_is_open

# Texts dense in what the parser looks for.
FRAGMENTS = ["<think>", "</think>", "<th", "</", "<", ">", "\n", "\n\n", " ", "a", "é ", "ink>", "</think", "think>"]
TEXTS = st.lists(st.sampled_from(FRAGMENTS), max_size=12).map("".join)


def streamed(text, cuts, thinking_open, cut=False):
    parser = ThinkingParser(thinking_open)
    bounds = [0, *sorted(cuts), len(text)]
    pieces = [piece for begin, end in itertools.pairwise(bounds) for piece in parser.feed(text[begin:end])]
    finished = parser.finished
    pieces += parser.close(cut)
    assert all(piece.text for piece in pieces)
    kinds = [piece.kind for piece in pieces]
    assert kinds == sorted(kinds, reverse=True), "a thought came after content"
    parts = {kind: "".join(piece.text for piece in pieces if piece.kind == kind) for kind in ("thinking", "content")}
    return Answer(parts["thinking"], parts["content"], finished)


@pytest.mark.parametrize(
    "text, opened, want",
    [
        ("<think>\nhm\n</think>\n\nyes", False, Answer("hm", "yes", True)),  # hybrid
        ("<think>\n\n</think>\n\nyes", False, Answer("", "yes", True)),  # hybrid, /no_think
        ("yes\n", False, Answer("", "yes\n", True)),  # hybrid after the hard switch, Instruct-2507
        ("hm\n</think>\n\nyes", True, Answer("hm", "yes", True)),  # Thinking-2507
        ("\n<think>\nhm\n</think>\n\nyes", True, Answer("hm", "yes", True)),  # Thinking-2507 that opens it once more
        ("", False, Answer("", "", True)),
        ("", True, Answer("", "", False)),
        ("hm\n", True, Answer("hm", "", False)),
        (" \n <think>hm", False, Answer("hm", "", False)),
        ("<think>\nhm\n</think>", False, Answer("hm", "", True)),
        ("a <think>b</think> c", False, Answer("", "a <think>b</think> c", True)),  # no tag but at the start
        ("hm</think>yes", False, Answer("", "hm</think>yes", True)),
        ("<think>a\n\n</think>b</think>\n\nc", False, Answer("a", "b</think>\n\nc", True)),  # the first of several ends it
        ("<think>a<think>b</think>c", False, Answer("a<think>b", "c", True)),
        ("<think>\n  a\n\n b </thin \n</think>\n \nc\n", False, Answer("  a\n\n b </thin ", " \nc\n", True)),
        ("\n\n hi", False, Answer("", "\n\n hi", True)),
        ("<", False, Answer("", "<", True)),
        ("<think>\na </th", False, Answer("a </th", "", False)),
    ],
)
def test_the_parts_of_an_answer(text, opened, want):
    assert split_thinking(text, opened) == want


@settings(max_examples=400, deadline=None)
@given(text=TEXTS, opened=st.booleans(), cut=st.booleans(), data=st.data())
def test_any_pieces_give_what_the_whole_gives(text, opened, cut, data):
    cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=8))
    want = split_thinking(text, opened, cut)
    assert streamed(text, cuts, opened, cut) == want
    assert streamed(text, range(len(text)), opened, cut) == want


@settings(max_examples=200, deadline=None)
@given(text=TEXTS, opened=st.booleans())
def test_cut_off_anywhere_gives_a_beginning_of_both_parts(text, opened):
    whole = split_thinking(text, opened)
    for end in range(len(text) + 1):
        part = split_thinking(text[:end], opened, cut=True)
        assert whole.thinking.startswith(part.thinking) and whole.content.startswith(part.content)
        assert part.finished or not part.content


@settings(max_examples=200, deadline=None)
@given(thought=st.text(), content=st.text(), opened=st.booleans())
def test_what_the_template_writes_comes_back(thought, content, opened):
    thought, content = thought.replace("</think>", "").strip("\n"), content.lstrip("\n")
    if opened and thought.lstrip().startswith("<think>"):
        thought = ""
    text = f"<think>\n{thought}\n</think>\n\n{content}"
    assert split_thinking(text.removeprefix("<think>\n") if opened else text, opened) == Answer(thought, content, True)


def test_a_long_answer_in_single_letters_takes_no_time_to_speak_of():
    parser = ThinkingParser()
    text = "<think>" + "a\n<" * 10_000 + "</think>" + "b" * 10_000
    pieces = [piece for letter in text for piece in parser.feed(letter)]
    assert "".join(piece.text for piece in pieces if piece.kind == "content") == "b" * 10_000


def test_a_closed_parser_takes_no_more():
    parser = ThinkingParser()
    parser.close()
    with pytest.raises(ValueError, match="one parser per answer"):
        parser.feed("a")


@pytest.mark.parametrize(
    "prompt, opened",
    [
        ("<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n", False),
        ("<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n<think>\n", True),
        ("<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n", False),
        ("<|im_start|>user\n<think>\n<|im_end|>\n<|im_start|>assistant\n", False),
        ("<|im_start|>assistant\n<think>\na<|im_end|>\n", False),
        ("<think>\n", False),
    ],
)
def test_the_prompt_tells_whether_a_thought_is_open(prompt, opened):
    assert thought_is_open(prompt) is opened


@pytest.mark.parametrize(
    "said, switch",
    [
        (["user:why?"], None),
        (["user:why? /no_think"], False),
        (["user:/think why?"], True),
        (["user:a /no_think", "assistant:b /think", "user:c"], False),
        (["user:a /no_think", "user:b /think"], True),
        (["system:/no_think", "user:a"], False),
        (["user:a /think b /no_think."], False),
        (["user:see http://x.org/think and /thinking or a/no_think/b"], None),
        (["tool:/no_think"], None),
    ],
)
def test_the_last_soft_switch_wins(said, switch):
    messages = [dict(zip(("role", "content"), line.split(":", 1), strict=True)) for line in said]
    assert last_soft_switch(messages) is switch


def test_soft_switches_in_parts_of_a_message():
    parts = [{"type": "text", "text": "a /no_think"}, {"type": "image"}]
    assert last_soft_switch([{"role": "user", "content": parts}, {"role": "user", "content": None}]) is False

"""A conversation streamed: the same tokens as generate writes, cut into thought and content, with stop strings and budgets."""

import jax
import jax.numpy as jnp
import pytest

from qwen3_jax import Chat, Sampling, from_pretrained, generate, load_tokenizer
from qwen3_jax.chat.session import Delta, _StopStrings, _text, default_sampling
from qwen3_jax.chat.thinking import split_thinking, thought_is_open
from tests.chat.tiny import write_checkpoint

MESSAGES = [{"role": "user", "content": "read"}]


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    write_checkpoint(folder)
    return Chat(from_pretrained(folder / "model"), load_tokenizer(folder / "model"))


def gathered(deltas):
    deltas = list(deltas)
    assert all(bool(delta.thinking) != bool(delta.content) for delta in deltas)
    return "".join(delta.thinking for delta in deltas), "".join(delta.content for delta in deltas)


@pytest.mark.parametrize("thinking, budget", [(None, None), (False, None), (True, 0)])
@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_the_pieces_are_what_generate_writes(chat, thinking, budget, temperature):
    sampling, tok = Sampling(temperature), chat.tok
    prompt = tok.apply_chat_template(MESSAGES, add_generation_prompt=True, enable_thinking=thinking, tokenize=False)
    out = generate(
        chat.model,
        jnp.asarray([tok.encode(prompt)]),
        max_new_tokens=140,
        sampling=sampling,
        key=jax.random.key(3),
        stop_tokens=tok.stop_token_ids,
        thinking=None if budget is None else tok.thinking_budget(budget),
    )
    text = tok.decode(out.tokens[0, : out.lengths[0] - out.finish_reason[0]], skip_special_tokens=True)
    wanted = split_thinking(text, thought_is_open(prompt))
    mode = thinking if budget is None else budget
    assert gathered(chat.stream(MESSAGES, mode, sampling, max_new_tokens=140, seed=3)) == (wanted.thinking, wanted.content)
    if budget is not None:
        assert wanted.finished and "Considering the limited time" in wanted.thinking


def test_a_stop_string_ends_the_content(chat):
    _, whole = gathered(chat.stream(MESSAGES, False, Sampling(0.0), max_new_tokens=60))
    stop = whole[10:13]
    _, cut = gathered(chat.stream(MESSAGES, False, Sampling(0.0), max_new_tokens=60, stop=["never", stop]))
    assert cut == whole[: whole.index(stop)]


def test_a_stream_that_is_left_does_no_harm(chat):
    first = next(chat.stream(MESSAGES, False, Sampling(0.0), max_new_tokens=60))
    assert isinstance(first, Delta)
    assert gathered(chat.stream(MESSAGES, False, Sampling(0.0), max_new_tokens=60))[1].startswith(first.content)


@pytest.mark.parametrize("size", [1, 2, 5])
def test_stop_strings_are_found_however_the_text_is_cut(size):
    text = "aabaabbab END a"
    watch, shown = _StopStrings(["abb", "END"]), ""
    for at in range(0, len(text), size):
        shown += watch.feed(text[at : at + size])
        if watch.found:
            break
    assert (shown + watch.close(), watch.found) == ("aaba", True)
    free = _StopStrings(["zz", "a!"])
    assert "".join(free.feed(text[at : at + size]) for at in range(0, len(text), size)) + free.close() == text
    with pytest.raises(ValueError, match="stop is 'END': accepted is a sequence of strings"):
        _StopStrings("END")


def test_characters_are_never_cut(chat):
    """Tokens of single bytes: a character appears when its last byte is there, and bytes that are no text end up replaced."""
    ids = chat.tok.encode("a🙂é")
    assert len(ids) > 5
    pieces = [piece for piece in _text(chat.tok, iter([[token] for token in ids])) if piece]
    assert pieces[0] == "a" and "".join(pieces) == "a🙂é" and not any("\ufffd" in piece for piece in pieces)
    assert "".join(_text(chat.tok, iter([ids[1:3]]))) == "\ufffd"


@pytest.mark.parametrize(
    "config, thinking, wanted",
    [
        ({}, None, Sampling(0.6, top_p=0.95, top_k=20)),
        ({}, False, Sampling(0.7, top_p=0.8, top_k=20)),
        ({"do_sample": False, "temperature": 0.6}, None, Sampling(temperature=0.0)),
        (
            {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05},
            True,
            Sampling(0.7, top_p=0.8, top_k=20, repetition_penalty=1.05),
        ),
    ],
)
def test_sampling_is_the_checkpoints_own(config, thinking, wanted):
    assert default_sampling(config, thinking) == wanted

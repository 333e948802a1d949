"""A conversation streamed: the same tokens as generate writes, cut into thought and content, with stop strings and budgets."""

import inspect
import itertools

import jax
import jax.numpy as jnp
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qwen3_jax import Chat, Sampling, from_pretrained, generate, load_tokenizer
from qwen3_jax.chat.session import Delta, _Characters, _StopStrings, default_sampling
from qwen3_jax.chat.thinking import split_thinking, thought_is_open
from qwen3_jax.generation.loop import make_settings
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
    wanted = split_thinking(text, thought_is_open(prompt), cut=not out.finish_reason[0])
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


@settings(max_examples=500, deadline=None)
@given(
    text=st.text("abcdx", max_size=14),
    words=st.lists(st.text("abcdx", min_size=1, max_size=5), max_size=4),
    data=st.data(),
)
@example(text="xabcdy", words=["abcd", "bc"], data=None)
def test_stop_strings_that_overlap_give_one_result_for_all_pieces(text, words, data):
    """Of every way to cut a text: what ends first stops it."""

    def shown(bounds):
        watch, out = _StopStrings(words), ""
        for begin, end in itertools.pairwise([0, *bounds, len(text)]):
            out += watch.feed(text[begin:end])
            if watch.found:
                break
        return out + watch.close(), watch.found

    ends = [(at + len(word), at) for word in words for at in range(len(text)) if text.startswith(word, at)]
    wanted = (text[: min(ends)[1]], True) if ends else (text, False)
    assert shown(range(1, len(text))) == wanted
    assert shown([]) == wanted
    if data is None:
        every = itertools.chain.from_iterable(itertools.combinations(range(1, len(text)), n) for n in range(len(text)))
        assert all(shown(bounds) == wanted for bounds in every)
    else:
        assert shown(sorted(data.draw(st.sets(st.integers(0, len(text)))))) == wanted


def test_characters_are_never_cut(chat):
    """Tokens of single bytes: a character appears when its last byte is there, and bytes that are no text end up replaced."""
    ids = chat.tok.encode("a🙂é")
    assert len(ids) > 5
    characters = _Characters(chat.tok)
    pieces = [piece for token in ids for piece in characters.feed([token]) if piece]
    assert pieces[0] == "a" and "".join(pieces) == "a🙂é" and not any("\ufffd" in piece for piece in pieces)
    assert characters.close() == ""
    assert list(characters.feed(ids[1:3])) == [] and characters.close() == "\ufffd"


@pytest.mark.parametrize("limit", [0, -1, 2.5, True, None])
def test_a_length_that_is_none_is_refused_at_once(chat, limit):
    with pytest.raises(ValueError, match=f"max_new_tokens is {limit!r}: accepted is an integer >= 1"):
        inspect.unwrap(Chat.stream)(chat, MESSAGES, max_new_tokens=limit)  # without the tests' own check of types


class Scripted(Chat):
    """A chat whose model writes these texts, token by token, and is then stopped by the limit, or stops by itself."""

    def __init__(self, chat, text, cut):
        super().__init__(chat.model, chat.tok)
        self._text, self._cut = text, cut

    def _tokens(self, ids, settings, limit):
        tokens = self.tok.encode(self._text)
        for number, token in enumerate(tokens, 1):
            yield [token], self._cut and number == len(tokens)


@pytest.mark.parametrize(
    "text, by_limit, by_itself",
    [
        ("<think>\nhm </thi", ("hm ", ""), ("hm </thi", "")),
        ("<think>\nhm\n</", ("hm", ""), ("hm\n</", "")),
        ("<thi", ("", ""), ("", "<thi")),
        ("<think>\nhm\n</think>\n\nyes </thi", ("hm", "yes </thi"), ("hm", "yes </thi")),
    ],
)
def test_an_answer_that_the_limit_cuts_within_a_tag_shows_none_of_it(chat, text, by_limit, by_itself):
    assert gathered(Scripted(chat, text, True).stream(MESSAGES)) == by_limit
    assert gathered(Scripted(chat, text, False).stream(MESSAGES)) == by_itself


def test_the_limit_and_the_end_of_a_turn_are_told_apart(chat):
    """Of the model's own tokens: only the last ones say that they are the last, and only where no stop token ended them."""
    tok = chat.tok
    ids = tok.encode(tok.apply_chat_template(MESSAGES, add_generation_prompt=True, tokenize=False))
    for stop in ((), tuple(range(400))):
        wanted = make_settings(chat.model, 1, Sampling(0.0), jax.random.key(0), stop, None, None, 20)
        said = [cut for _, cut in chat._tokens(ids, wanted, 20)]
        assert said == ([False, False, True] if not stop else [False])


@pytest.mark.parametrize(
    "said, thinking, temperature", [("a", None, 0.6), ("a /no_think", None, 0.7), ("a /no_think", True, 0.7), ("a", False, 0.7)]
)
def test_without_settings_of_its_own_a_model_that_will_not_think_is_drawn_as_recommended(
    chat, monkeypatch, said, thinking, temperature
):
    drawn = []

    def settings_of(model, rows, sampling, *others):
        drawn.append(sampling)
        return make_settings(model, rows, sampling, *others)

    monkeypatch.setattr("qwen3_jax.chat.session.make_settings", settings_of)
    monkeypatch.setitem(vars(chat.tok), "generation_config", {})
    chat.stream([{"role": "user", "content": said}], thinking)
    assert drawn[0].temperature == temperature


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

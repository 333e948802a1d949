import random

import pytest

from qwen3_jax import load_tokenizer
from qwen3_jax.chat.thinking import last_soft_switch
from qwen3_jax.data.chat import ChatConfig, samples, with_flags
from qwen3_jax.data.files import DataError
from qwen3_jax.data.records import Conversation

ASK = {"role": "user", "content": "one?"}
THINK = {"role": "assistant", "content": "eins", "reasoning_content": "hm"}
PLAIN = {"role": "assistant", "content": "zwei"}
SYSTEM = {"role": "system", "content": "count"}
BEGIN, END = "<|im_start|>assistant\n", "<|im_end|>"


def told(tok, messages, config=None, tools=None):
    """Each sample as its whole text and the text of each run of targets; and how many were dropped."""
    found, dropped = samples(tok, Conversation(messages, tools), config or ChatConfig())
    shown = []
    for sample in found:
        runs, open_ = [], False
        for token, target in zip(sample.ids, sample.targets, strict=True):
            if target and not open_:
                runs.append([])
            if target:
                runs[-1].append(token)
            open_ = target
        shown.append((tok.decode(sample.ids), [tok.decode(run) for run in runs]))
    return shown, dropped


def test_loss_is_on_the_answer_alone_with_its_end_and_its_thought(tok):
    ((text, runs),), dropped = told(tok, [SYSTEM, ASK, THINK])
    assert text == tok.apply_chat_template([SYSTEM, ASK, THINK], tokenize=False)
    assert runs == [f"<think>\nhm\n</think>\n\neins{END}"]
    assert dropped == 0


def test_ids_are_those_of_the_template(tok):
    for messages in ([SYSTEM, ASK, THINK], [ASK, PLAIN]):
        (sample,), _ = samples(tok, Conversation(messages), ChatConfig())
        assert sample.ids == tok.apply_chat_template(messages)


def test_an_answer_without_a_thought_keeps_the_empty_think_block_and_learns_it(tok):
    ((_, runs),), _ = told(tok, [ASK, PLAIN])
    assert runs == [f"<think>\n\n</think>\n\nzwei{END}"]


def test_a_turn_is_learned_as_it_is_generated_in_a_sample_a_question(tok):
    """The hybrid template drops the first thought once a second question is asked."""
    shown, _ = told(tok, [ASK, THINK, ASK, PLAIN])
    first = tok.apply_chat_template([ASK, THINK], tokenize=False)
    second = tok.apply_chat_template([ASK, THINK, ASK, PLAIN], tokenize=False)
    assert "hm" in first and "hm" not in second
    assert shown == [(first, [f"<think>\nhm\n</think>\n\neins{END}"]), (second, [f"<think>\n\n</think>\n\nzwei{END}"])]
    last, _ = told(tok, [ASK, THINK, ASK, PLAIN], ChatConfig(answers="last"))
    assert last == shown[1:]


@pytest.mark.parametrize("family", ["instruct_2507", "coder"])
def test_a_template_without_thoughts_gives_one_sample_with_every_answer(tokenizer_folder, family):
    tok = load_tokenizer(tokenizer_folder, family)
    messages = [SYSTEM, ASK, PLAIN, ASK, {"role": "assistant", "content": "drei"}]
    assert told(tok, messages) == ([(tok.apply_chat_template(messages, tokenize=False), [f"zwei{END}", f"drei{END}"])], 0)
    ((_, runs),), _ = told(tok, messages, ChatConfig(answers="last"))
    assert runs == [f"drei{END}"]


def test_a_thought_that_the_prompt_opens_is_learned_without_its_tag(tokenizer_folder):
    ((_, runs),), _ = told(load_tokenizer(tokenizer_folder, "thinking_2507"), [ASK, THINK])
    assert runs == [f"hm\n</think>\n\neins{END}"]


def test_steps_with_tools_are_one_sample_and_results_are_no_targets(tok):
    call = {"role": "assistant", "content": "", "reasoning_content": "look", "tool_calls": [{"name": "f", "arguments": {}}]}
    messages = [ASK, call, {"role": "tool", "content": "42"}, THINK]
    tools = [{"name": "f"}]
    shown, _ = told(tok, messages, tools=tools)
    assert shown == [
        (
            tok.apply_chat_template(messages, tools, tokenize=False),
            [
                f'<think>\nlook\n</think>\n\n<tool_call>\n{{"name": "f", "arguments": {{}}}}\n</tool_call>{END}',
                f"<think>\nhm\n</think>\n\neins{END}",
            ],
        )
    ]


def test_every_answer_is_a_target_once(tok):
    draw = random.Random(0)
    for _ in range(30):
        messages, answers = [], []
        for turn in range(draw.randint(1, 5)):
            messages.append({"role": "user", "content": f"question {turn}"})
            answer = {"role": "assistant", "content": f"answer {turn}."}
            if draw.random() < 0.5:
                answer["reasoning_content"] = f"thought {turn}"
            messages.append(answer)
            answers.append(f"<think>\n{answer.get('reasoning_content', '')}\n</think>\n\nanswer {turn}.{END}")
        shown, _ = told(tok, messages, ChatConfig(flags=True))
        assert [run for _, runs in shown for run in runs] == answers


def test_over_long_ones_are_cut_or_dropped_and_counted(tok):
    messages = [ASK, {"role": "assistant", "content": "12345678901234567890"}]
    (whole,), _ = samples(tok, Conversation(messages), ChatConfig())
    length = len(whole.ids)
    begin = whole.targets.index(True)
    (same,), dropped = samples(tok, Conversation(messages), ChatConfig(max_length=length))
    assert (same, dropped) == (whole, 0)
    (cut,), dropped = samples(tok, Conversation(messages), ChatConfig(max_length=length - 5))
    assert (cut.ids, cut.targets, cut.cut, dropped) == (whole.ids[:-5], whole.targets[:-5], True, 0)
    assert samples(tok, Conversation(messages), ChatConfig(max_length=length - 5, over_long="drop")) == ([], 1)
    # Cut before its answer it has nothing to learn.
    assert samples(tok, Conversation(messages), ChatConfig(max_length=begin)) == ([], 1)
    assert len(samples(tok, Conversation(messages), ChatConfig(max_length=begin + 1))[0]) == 1


def ends(messages):
    return [message["content"] for message in messages if message["role"] == "user"]


def test_flags_follow_what_answers_do():
    always, never = random.Random(0), random.Random(0)
    assert ends(with_flags([ASK, THINK], always, 1.0)) == ["one? /think"]
    assert ends(with_flags([ASK, THINK], never, 0.0)) == ["one?"]  # thinking is the default
    assert ends(with_flags([ASK, PLAIN], never, 0.0)) == ["one? /no_think"]
    mixed = [ASK, PLAIN, ASK, PLAIN, ASK, THINK, ASK, THINK]
    assert ends(with_flags(mixed, never, 0.0)) == ["one? /no_think", "one?", "one? /think", "one?"]
    assert ends(with_flags(mixed, always, 1.0)) == ["one? /no_think", "one? /no_think", "one? /think", "one? /think"]
    # A switch that is there is left where it is right, and overruled where it is not.
    wrong = {"role": "user", "content": "one? /think"}
    assert ends(with_flags([wrong, THINK], always, 1.0)) == ["one? /think"]
    assert ends(with_flags([wrong, PLAIN], never, 0.0)) == ["one? /think /no_think"]
    system = {"role": "system", "content": "count /no_think"}
    assert ends(with_flags([system, ASK, PLAIN], never, 0.0)) == ["one?"]
    assert ends(with_flags([system, ASK, THINK], never, 0.0)) == ["one? /think"]
    inline = {"role": "assistant", "content": "<think>\nhm\n</think>\n\neins"}
    assert ends(with_flags([ASK, inline], never, 0.0)) == ["one?"]
    assert ASK["content"] == "one?"


def test_the_last_switch_before_an_answer_is_what_it_does():
    draw = random.Random(1)
    for _ in range(200):
        messages = []
        for _ in range(draw.randint(1, 6)):
            messages += [ASK, draw.choice([THINK, PLAIN])]
        flagged = with_flags(messages, draw, 0.3)
        for at, message in enumerate(flagged):
            if message["role"] == "assistant":
                assert (last_soft_switch(flagged[:at]) is not False) == ("reasoning_content" in message)


def test_flags_are_the_same_wherever_a_conversation_stands_and_others_with_another_seed(tok):
    messages = [{"role": "user", "content": f"{number}?"} if number % 2 == 0 else THINK for number in range(60)]
    one, two = (samples(tok, Conversation(messages), ChatConfig(flags=True, answers="last", seed=seed)) for seed in (0, 1))
    assert one == samples(tok, Conversation(messages), ChatConfig(flags=True, answers="last"))
    assert one != two
    count = tok.decode(one[0][-1].ids).count("/think")
    assert 5 <= count <= 25  # of 30 questions, each with a chance of a half


def test_a_template_that_hides_answers_is_refused(tokenizer_folder):
    tok = load_tokenizer(tokenizer_folder)
    tok.template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    with pytest.raises(DataError, match="does not show an answer after its generation prompt"):
        samples(tok, Conversation([ASK, PLAIN]), ChatConfig())


def test_limits_that_are_none_are_refused():
    with pytest.raises(DataError, match="flag_rate is 1.5: accepted is 0 to 1"):
        ChatConfig(flag_rate=1.5)
    with pytest.raises(DataError, match="max_length is 1: accepted is at least 2"):
        ChatConfig(max_length=1)

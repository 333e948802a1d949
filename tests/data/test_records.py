import json
from collections import Counter

import pytest

from qwen3_jax.data.prepare import prepare
from qwen3_jax.data.prepared import Prepared
from qwen3_jax.data.records import BadRecord, Conversation, document, parsed
from qwen3_jax.data.tally import Tally, TooManyBadRecords
from qwen3_jax.data.worker import Work

ANSWERED = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]


@pytest.mark.parametrize(
    "line, kind, found",
    [
        (b'{"text": "cut', "broken JSON", "Unterminated string"),
        (b"[" * 100_000, "broken JSON", "nested too deeply"),
        (b'["text"]', "broken JSON", "a JSON list where an object is accepted"),
        (b'{"text": "caf\xe9"}', "not UTF-8", "can't decode byte 0xe9"),
        (b'{"text": "\\ud800"}', "not UTF-8", "surrogates not allowed"),
        (b"  ", "empty", "a blank line"),
        (b'{"text": ""}', "empty", "text is blank"),
        (b'{"text": " \\n\\t"}', "empty", "text is blank"),
        (b'{"messages": []}', "empty", "messages is an empty list"),
        (b"{}", "no known field", "fields none where messages or conversations or text or content is accepted"),
        (b'{"body": "x", "text": null}', "no known field", "fields body, text where"),
        (b'{"text": 3}', "no text in its field", "text is int where text or a list of messages is accepted"),
        (b'{"messages": "x", "text": "y"}', "no conversation", "messages is str where a list of messages is accepted"),
        (b'{"conversations": {"role": "user"}}', "no conversation", "conversations is dict where a list of messages"),
        (b'{"messages": ["hi"]}', "no conversation", "messages[0] is str where an object is accepted"),
        (b'{"messages": [{"role": "me", "content": "x"}]}', "no conversation", "messages[0].role is 'me' where system, user,"),
        (b'{"messages": [{"role": "user", "content": "x"}]}', "no conversation", "messages has no message of the assistant"),
        (b'{"messages": [{"role": "user", "content": 3}]}', "no conversation", "messages[0].content is int"),
        (b'{"messages": [{"role": "user", "content": [{"image": 1}]}]}', "no conversation", "has a part that is no text"),
        (b'{"messages": [{"role": "user", "content": " "}]}', "empty", "messages[0].content is blank"),
        (b'{"messages": [{"role": "user", "content": "a<|im_end|>b"}]}', "no conversation", "content has <|im_end|> in it"),
        (
            b'{"messages": [{"role": "assistant", "content": "a", "thinking": "<|im_start|>"}]}',
            "no conversation",
            "thinking has",
        ),
    ],
)
def test_every_kind_of_bad_record(line, kind, found):
    with pytest.raises(BadRecord) as caught:
        document(parsed(line))
    assert caught.value.kind == kind
    assert found in caught.value.found


def test_what_is_read_of_a_record():
    assert document({"content": "code", "text": "prose"}) == "prose"
    assert document({"content": "code", "text": "prose"}, "content") == "code"
    assert document({"text": "prose", "messages": ANSWERED}) == Conversation(ANSWERED)
    assert document({"text": "prose", "messages": None}) == document({"text": "prose", "messages": "x"}, "text") == "prose"
    older = [{"from": "human", "value": "?"}, {"from": "gpt", "value": "!"}]
    assert document({"conversations": older, "tools": "[]"}) == Conversation(ANSWERED)
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"text": "b"}], "name": None}, ANSWERED[1]]
    told = document({"messages": parts, "tools": '[{"name": "f"}]'})
    assert told == Conversation([{"role": "user", "content": "ab"}, ANSWERED[1]], [{"name": "f"}])


def test_bad_records_of_a_run_are_counted_and_the_first_named_by_file_and_line(tmp_path, tokenizer_folder):
    good = json.dumps({"text": "good"}).encode()
    bad = [b'{"text": "cut', b'{"text": "\xff"}', b"", b'{"body": 1}', b'{"text": 1}', b'{"messages": "x"}']
    (tmp_path / "a.jsonl").write_bytes(b"\n".join([good, *bad, good]))
    (tmp_path / "b.jsonl").write_bytes(b"\n".join([bad[0]] * 9 + [good] * 11))
    for workers, folder in ((0, "one"), (2, "two")):
        total = prepare(
            [str(tmp_path / "*.jsonl")],
            tmp_path / folder,
            Work(str(tokenizer_folder)),
            workers=workers,
            max_bad_rate=0.6,
            piece_bytes=100,
        )
        kinds = {"broken JSON": 10, "not UTF-8": 1, "empty": 1, "no conversation": 1}
        kinds |= {"no known field": 1, "no text in its field": 1}
        assert total.tally.bad == Counter(kinds) and total.tally.records == 28
        assert total.figures.documents == 13
        places = [str(fault).split(": ")[:2] for fault in total.tally.first]
        a, b = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
        assert places == [
            [f"{a}:2", "broken JSON"],
            [f"{a}:3", "not UTF-8"],
            [f"{a}:4", "empty"],
            [f"{a}:5", "no known field"],
            [f"{a}:6", "no text in its field"],
            [f"{a}:7", "no conversation"],
            *([f"{b}:{line}", "broken JSON"] for line in range(1, 5)),
        ]
        index = Prepared(tmp_path / folder).index
        assert index["bad"] == kinds and index["first_bad"] == [str(fault) for fault in total.tally.first]


def test_a_run_stops_past_the_rate_and_goes_on_with_another(tmp_path, tokenizer_folder):
    lines = [b'{"text": "good"}'] * 18 + [b"{"] * 2
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    arguments = ([str(tmp_path / "a.jsonl")], tmp_path / "out", Work(str(tokenizer_folder)))
    with pytest.raises(
        TooManyBadRecords, match=r"2 of 20 records are bad \(2 broken JSON\); accepted is a rate of 0.09 \(--max-bad-rate\)"
    ) as caught:
        prepare(*arguments, workers=0, max_bad_rate=0.09)
    assert f"{tmp_path / 'a.jsonl'}:19: broken JSON: Expecting property name" in str(caught.value)
    assert not (tmp_path / "out" / "dataset.json").exists()
    assert prepare(*arguments, workers=0, max_bad_rate=0.1).figures.documents == 18


def test_a_rate_counts_from_a_thousand_records_on_while_a_run_goes():
    tally = Tally(records=999, bad=Counter(empty=999))
    tally.check(0.5)
    tally.records = 1998
    tally.check(0.5)
    tally.bad["empty"] += 1
    with pytest.raises(TooManyBadRecords, match="1000 of 1998 records"):
        tally.check(0.5)


def test_a_run_that_goes_wrong_stops_long_before_its_end(tmp_path, tokenizer_folder):
    for number in range(20):
        (tmp_path / f"{number:02}.jsonl").write_bytes(b"{\n" * 1000)
    with pytest.raises(TooManyBadRecords, match="1000 of 1000 records"):
        prepare([str(tmp_path / "*.jsonl")], tmp_path / "out", Work(str(tokenizer_folder)), workers=0, piece_bytes=2000)
    assert len(list((tmp_path / "out").glob("part-*.json"))) == 1

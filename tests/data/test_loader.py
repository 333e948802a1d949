import dataclasses
import json
import resource
from collections import Counter

import fsspec
import numpy as np
import pytest

from qwen3_jax import global_batch, make_mesh, process_rows
from qwen3_jax.data.encoding import record_tokens
from qwen3_jax.data.files import DataError, check_choice
from qwen3_jax.data.loader import LoaderConfig, make_loader
from qwen3_jax.data.mixture import Draws, OverLong, Source, long_context
from qwen3_jax.data.prepare import prepare
from qwen3_jax.data.prepared import Prepared, allow_open_files
from qwen3_jax.data.shards import shards_for
from qwen3_jax.data.worker import Work
from tests.data.batches import BATCH, SEQ, batches, digits, rows_of, same, spans


def test_rows_hold_documents_whole_with_the_next_token_as_label(config, web):
    prepared = Prepared(web)
    known = {tuple(record_tokens(record)[0].tolist()) for record in prepared.read(range(len(prepared)))}
    (batch, *_) = batches(LoaderConfig((Source("web", web),), seed=5), 1)
    assert batch.tokens.shape == batch.mask.shape == (BATCH, SEQ)
    assert (batch.tokens.dtype, batch.labels.dtype, batch.segment_ids.dtype, batch.mask.dtype) == (*[np.int32] * 3, np.float32)
    found = [(*tokens, labels[-1]) for tokens, labels in spans(batch)]
    assert all(tokens[1:] == labels[:-1] for tokens, labels in spans(batch))
    assert len(found) > BATCH and set(found) <= known and len(set(found)) == len(found)
    padding = batch.segment_ids == 0
    assert (batch.mask == ~padding).all() and not batch.tokens[padding].any() and not batch.labels[padding].any()
    # Padding is at the end alone, and segments count from 1.
    for segments in batch.segment_ids:
        used = segments[segments > 0]
        assert (segments[: len(used)] == used).all() and used[0] == 1 and set(np.diff(used)) <= {0, 1}


@pytest.mark.parametrize("over_long", ["split", "cut", "drop", None])
def test_a_long_document_is_split_without_losing_a_label_or_cut_or_dropped(books, over_long):
    prepared = Prepared(books)
    documents = [record_tokens(record)[0].tolist() for record in prepared.read(range(len(prepared)))]
    long = sum(len(tokens) > SEQ + 1 for tokens in documents)
    assert 0 < long < len(documents)
    config = LoaderConfig((Source("books", books, over_long=over_long),), shards=1, waiting=4)
    with make_loader(config, batch=1, seq=SEQ) as loader:
        given = Counter()
        while loader.report()["epochs"]["books"] < 1:
            given.update(label for _, span in spans(next(loader)) for label in span)
        report, state = loader.report(), loader.state()["shards"]["0"]
        drawn = [loader._views[0].document(place)[0] for place in range(state["drawn"][0])]
    # What still waits is not given.
    expected = Counter()
    for number in drawn:
        expected.update(documents[number][1:] if over_long in ("split", None) else documents[number][1 : SEQ + 1])
    for _, number, start, slots in state["held"]:
        expected.subtract(documents[number][start + 1 : start + slots + 1])
    assert given == +expected
    assert (over_long == "drop") == all(len(documents[number]) <= SEQ + 1 for number in drawn)
    assert report["cut"] == {"books": long if over_long == "cut" else 0}
    assert report["dropped"] == {"books": long if over_long == "drop" else 0}


def test_an_epoch_has_every_document_once_in_an_order_of_its_own(web):
    """Twelve shards of 300 documents: read on until all have gone through two epochs."""
    config = LoaderConfig((Source("web", web),), seed=5, shards=12)
    with make_loader(config, batch=12, seq=SEQ) as loader:
        heads = [labels[:7] for _ in range(80) for _, labels in spans(next(loader))]
        drawn = [shard["drawn"][0] for shard in loader.state()["shards"].values()]
        epochs = loader.report()["epochs"]["web"]
        held = [piece[1] for shard in loader.state()["shards"].values() for piece in shard["held"]]
    assert epochs == sum(drawn) / 300 and min(drawn) * 12 > 2 * 300
    view = [loader._views[0].document(place)[0] for place in range(600)]
    assert sorted(view[:300]) == sorted(view[300:]) == list(range(300))
    assert view[:300] != view[300:] and view[:300] != list(range(300))
    # Every document that was drawn was given, or waits.
    given = Counter(loader._views[0].document(shard + 12 * at)[0] for shard, count in enumerate(drawn) for at in range(count))
    assert len(heads) == given.total() - len(held)
    assert min(given.values()) >= 2


def test_shares_of_tokens_are_the_weights(config):
    with make_loader(config, batch=BATCH, seq=SEQ) as loader:
        for _ in range(60):
            next(loader)
        slots = loader.report()["slots"]
        first = loader.state()
    total = sum(slots.values())
    # Of each shard to within a document of each source; 200 is the longest.
    for shard in first["shards"].values():
        web, books = shard["slots"]
        assert abs(web - 3 * books) <= 60 + 3 * 2 * 200
    assert slots["web"] / total == pytest.approx(0.75, abs=0.02)


def test_shards_begin_with_different_sources(web):
    with make_loader(LoaderConfig((Source("a", web), Source("b", web))), batch=32, seq=SEQ) as loader:
        firsts = Counter(Draws(loader._views, 0, shard, 32)().source for shard in range(32))
    assert firsts.keys() == {0, 1} and min(firsts.values()) >= 6


def test_rows_of_a_mesh(config):
    mesh = make_mesh("data=4,context=2")
    rows = process_rows(mesh, BATCH)
    (whole, *_) = batches(config, 1)
    placed = global_batch(batches(config, 1, rows=rows)[0], mesh, BATCH)
    assert same(placed, whole) and placed.tokens.addressable_shards[0].data.shape == (3, SEQ)
    (part, *_) = batches(config, 1, rows=rows[3:8])
    assert same(part, rows_of(whole, range(3, 8)))


def test_a_source_in_a_store_is_copied_once_and_gives_the_same_batches(tmp_path, config, web):
    store = fsspec.filesystem("memory")
    store.pipe({f"/bucket/web/{file.name}": file.read_bytes() for file in web.iterdir()})
    try:
        there = dataclasses.replace(
            config, cache=tmp_path, sources=(Source("web", "memory://bucket/web", 3.0), config.sources[1])
        )
        assert all(map(same, batches(there, 3), batches(config, 3)))
        (copy,) = tmp_path.iterdir()
        times = {file.name: file.stat().st_mtime_ns for file in copy.glob("part-*")}
        assert len(times) == 2 * Prepared(web).parts > 2
        (copy / "part-00000.array_record").write_bytes(b"cut")
        assert same(batches(there, 1)[0], batches(config, 1)[0])
        again = {file.name for file in copy.glob("part-*") if file.stat().st_mtime_ns != times[file.name]}
        assert again == {"part-00000.array_record", "part-00000.lengths.npy"}
        store.pipe("/bucket/web/part-00001.array_record", b"cut")
        (copy / "part-00001.lengths.npy").unlink()
        with pytest.raises(DataError, match="web/part-00001.array_record has not the .* bytes that dataset.json says"):
            batches(there, 1)
        store.rm("/bucket/web/part-00001.array_record")
        with pytest.raises(DataError, match="memory://bucket/web/part-00001.array_record: "):
            batches(there, 1)
        store.rm("/bucket/web/dataset.json")
        with pytest.raises(DataError, match="memory://bucket/web has no dataset.json: accepted is a folder that"):
            batches(there, 1)
    finally:
        store.rm("/bucket", recursive=True)


def test_shards_are_the_largest_divisor_up_to_256():
    assert [shards_for(batch, None) for batch in (1, 48, 256, 512, 1000, 257)] == [1, 48, 256, 256, 250, 1]
    assert shards_for(512, 64) == 64
    with pytest.raises(DataError, match="shards is 5: accepted is a divisor of the batch, 12"):
        shards_for(12, 5)


def test_sources_of_many_files_raise_the_limit_of_open_ones(monkeypatch):
    limits = [(1024, 4096)]
    monkeypatch.setattr(resource, "getrlimit", lambda what: limits[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda what, limit: limits.append(limit))
    allow_open_files(700)
    assert limits == [(1024, 4096)]
    allow_open_files(2000)
    assert limits == [(1024, 4096), (2256, 4096)]
    with pytest.raises(
        DataError, match=r"4000 files and this process may hold 4096 open: accepted is a hard limit .* of at least 4256"
    ):
        allow_open_files(4000)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"batch": 0}, "process_count 1: accepted|batch is 0"),
        ({"seq": 0}, "seq is 0: accepted is at least 1"),
        ({"process_index": 2, "process_count": 2}, "process_index is 2 of process_count 2: accepted are 0 to"),
        ({"process_count": 13}, "of at most 12 processes"),
        ({"rows": [12]}, r"rows is \[12\]: accepted are some of 0 to 11"),
        ({"prefetch": -1}, "prefetch is -1"),
    ],
)
def test_settings_that_are_refused(config, change, message):
    with pytest.raises(DataError, match=message):
        make_loader(config, **({"batch": BATCH, "seq": SEQ} | change))


def test_sources_that_are_refused(tmp_path, web, config):
    with pytest.raises(DataError, match="source web: weight is 0.0: accepted is a number above 0"):
        Source("web", web, weight=0.0)
    with pytest.raises(DataError, match="source web: min_tokens is 1: accepted is at least 2"):
        Source("web", web, min_tokens=1)
    with pytest.raises(DataError, match="source web: max_tokens is 1: accepted is at least min_tokens, 2"):
        Source("web", web, max_tokens=1)
    # The type checker of the tests stands before what a user of the constructor sees.
    with pytest.raises(DataError, match="over_long is 'keep': accepted is split or cut or drop"):
        check_choice("over_long", "keep", OverLong)
    with pytest.raises(DataError, match="two sources are named web"):
        LoaderConfig((Source("web", web), Source("web", web)))
    with pytest.raises(DataError, match="sources is empty"):
        LoaderConfig(())
    with pytest.raises(DataError, match="has no dataset.json; accepted is a folder that `qwen3-jax data prepare` has written"):
        make_loader(LoaderConfig((Source("web", tmp_path),)), batch=1, seq=8)
    with pytest.raises(DataError, match="source web: of 300 documents in .* none has 5000 to any number of tokens"):
        make_loader(LoaderConfig((Source("web", web, min_tokens=5000),)), batch=1, seq=8)


def test_a_damaged_folder_and_two_tokenizers_are_refused(tmp_path, made, tokenizer_folder):
    folder = made(["some text"] * 3)
    index = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps(index | {"tokens": 1}))
    with pytest.raises(DataError, match="its lengths do not add up to the tokens"):
        Prepared(folder)
    (folder / "dataset.json").write_text(json.dumps(index | {"version": 0}))
    with pytest.raises(DataError, match="is of version 0: accepted is 1"):
        Prepared(folder)
    (folder / "dataset.json").write_text(json.dumps(index | {"tokenizer": "another"}))
    other = made(["other text"])
    with pytest.raises(DataError, match="sources a and b were tokenised by different tokenizers"):
        make_loader(LoaderConfig((Source("a", folder), Source("b", other))), batch=1, seq=8)
    file = folder / "part-00000.array_record"
    content = bytearray(file.read_bytes())
    content[65536 + 64 : 65536 + 96] = bytes(32)
    file.write_bytes(content)
    with pytest.raises(DataError, match="is damaged"):
        Prepared(folder).read(range(3))
    (folder / "dataset.json").write_text(json.dumps(index))
    for prefetch in (0, 2):
        with make_loader(LoaderConfig((Source("a", folder),)), batch=1, seq=8, prefetch=prefetch) as loader:
            before = loader.state()
            for _ in range(2):
                with pytest.raises(DataError, match="is damaged"):
                    next(loader)
            assert loader.state() == before
    file.write_bytes(content[:-1])
    with pytest.raises(DataError, match=r"has \d+ bytes, and dataset.json says"):
        Prepared(folder)


def test_the_long_context_stage_has_three_quarters_of_its_tokens_from_long_documents(made):
    draw = np.random.default_rng(2)
    lengths = [int(length) for length in draw.integers(1000, 36_000, 60)] + [4096, 16_383, 16_384, 32_768, 32_769, 4095]
    folder = made([digits(number, length) for number, length in enumerate(lengths)])
    sources = long_context([Source("books", folder)])
    assert [(source.name, source.weight) for source in sources] == [("books.long", 0.75), ("books.middle", 0.25)]
    with make_loader(LoaderConfig(sources, waiting=8), batch=2, seq=32_768) as loader:
        long, middle = loader._views
        assert len(long) == sum(16_384 <= length <= 32_768 for length in lengths)
        assert len(middle) == sum(4_096 <= length < 16_384 for length in lengths)
        found = [len(tokens) + 1 for _ in range(20) for tokens, _ in spans(next(loader))]
        slots = loader.report()["slots"]
    assert slots["books.long"] / sum(slots.values()) == pytest.approx(0.75, abs=0.03)
    given = sum(length for length in found if length >= 16_384) / sum(found)
    assert given == pytest.approx(0.75, abs=0.08) and min(found) >= 4096


def test_targets_of_conversations_are_the_mask(tmp_path, tokenizer_folder, tok):
    lines = [
        json.dumps({"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": f"say {n}"}]})
        for n in range(20)
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    total = prepare([str(tmp_path / "a.jsonl")], tmp_path / "out", Work(str(tokenizer_folder)), workers=0)
    assert total.figures.conversations == 20
    config = LoaderConfig((Source("chat", tmp_path / "out"),))
    with make_loader(config, batch=2, seq=8) as short:
        assert short.report()["cut"] == {"chat": 20}
    with make_loader(config, batch=2, seq=128) as loader:
        batch = next(loader)
        assert loader.vocab_size == tok.vocab_size
    learned = 0
    for labels, mask, segments in zip(batch.labels, batch.mask, batch.segment_ids, strict=True):
        for number in range(1, segments.max() + 1):
            inside = segments == number
            text = tok.decode(labels[inside & (mask > 0)])
            question = tok.decode(labels[inside & (mask == 0)]).split("?")[0].split("\n")[-1]
            assert text == f"<think>\n\n</think>\n\nsay {question}<|im_end|>"
            learned += 1
    assert learned > 2

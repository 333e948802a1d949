import dataclasses
import json
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3_jax.data.encoding import record_tokens
from qwen3_jax.data.files import DataError
from qwen3_jax.data.loader import make_loader, merge_states
from qwen3_jax.data.mixture import Source
from tests.data.batches import BATCH, SEQ, batches, rows_of, same, spans

POINTS = st.tuples(st.integers(1, BATCH), st.integers(0, 6), st.integers(1, BATCH), st.integers(1, 4))


@settings(max_examples=12, deadline=None)
@given(st.lists(POINTS, min_size=1, max_size=3), st.sampled_from([None, 1, 4, 6]))
def test_after_restarts_on_any_processes_the_next_batch_is_the_one_that_would_have_come(config, plan, shards):
    config = dataclasses.replace(config, shards=shards)
    expected = batches(config, sum(steps + more for _, steps, _, more in plan))
    state, at = None, 0
    for processes, steps, others, more in plan:
        for count, go_on in ((processes, steps), (others, more)):
            states = []
            for index in range(count):
                settings = dict(process_index=index, process_count=count, prefetch=index % 3)
                with make_loader(config, batch=BATCH, seq=SEQ, **settings) as loader:
                    if state is not None:
                        loader.restore(state)
                    for step in range(go_on):
                        assert same(next(loader), rows_of(expected[at + step], loader.rows))
                    states.append(loader.state())
            state, at = json.loads(json.dumps(merge_states(states))), at + go_on
    assert at == len(expected)


def test_another_stage_goes_on_where_its_sources_were(config, web, books):
    """Other weights, order, length, a new source and one less: no document of an epoch comes twice, and none is left out."""
    with make_loader(config, batch=BATCH, seq=SEQ) as loader:
        given = Counter(tuple(span) for _ in range(5) for _, span in spans(next(loader)))
        state = json.loads(json.dumps(loader.state()))
        assert loader.report()["epochs"]["web"] < 1
    stage = dataclasses.replace(config, sources=(Source("new", web), Source("web", web, 1.0)))
    with make_loader(stage, batch=BATCH, seq=2 * SEQ) as loader:
        loader.carry_on(state)
        assert loader.report()["batches"] == 0
        shards = loader.state()["shards"]
        for number, shard in state["shards"].items():
            assert shards[number]["drawn"] == [0, shard["drawn"][0]] and shards[number]["slots"] == [0, 0]
            assert [list(piece) for piece in shards[number]["held"]] == [[1, *piece] for at, *piece in shard["held"] if at == 0]
        next(loader)
        for number, shard in loader.state()["shards"].items():
            assert shard["drawn"][1] >= state["shards"][number]["drawn"][0]
        again = make_loader(stage, batch=BATCH, seq=2 * SEQ, process_index=1, process_count=3)
        with again:
            again.carry_on(state)
            first = next(again)
        loader.carry_on(state)
        assert same(first, rows_of(next(loader), again.rows))
    only = dataclasses.replace(config, sources=(Source("web", web),))
    with make_loader(only, batch=BATCH, seq=2 * SEQ) as loader:
        loader.carry_on(state)
        while loader.report()["epochs"]["web"] < 1:
            given.update(tuple(span) for _, span in spans(next(loader)))
        firsts = [loader._views[0].document(place)[0] for place in range(300)]
        prepared = loader._views[0].prepared
        waits = {piece[1] for shard in loader.state()["shards"].values() for piece in shard["held"]}
    assert sorted(firsts) == list(range(300))
    texts = {number: tuple(record_tokens(record)[0][1:].tolist()) for number, record in enumerate(prepared.read(range(300)))}
    counts = {number: given[text] for number, text in texts.items()}
    # Shards are not equally far: some have begun the second epoch while others are in the first.
    assert all(count <= 2 for count in counts.values())
    assert sum(count == 1 for count in counts.values()) > 250
    assert all(count >= 1 or number in waits for number, count in counts.items() if number in {firsts[at] for at in range(200)})
    for change, message in (
        ({"seed": 6}, "the state has seed 5, and the loader 6"),
        ({"shards": 6}, "the state has shard_count 12, and the loader 6"),
        (
            {"sources": (Source("web", books),)},
            "source web had documents 300 and has 40: accepted is the same, or another name",
        ),
    ):
        with make_loader(dataclasses.replace(config, **change), batch=BATCH, seq=SEQ) as loader:
            with pytest.raises(DataError, match=message):
                loader.carry_on(state)


def test_reading_ahead_changes_nothing_and_state_is_of_the_last_batch_given(config):
    plain, ahead = (make_loader(config, batch=BATCH, seq=SEQ, prefetch=prefetch) for prefetch in (0, 3))
    with plain, ahead:
        assert plain.state() == ahead.state()
        for _ in range(5):
            assert same(next(plain), next(ahead))
            assert plain.state() == ahead.state()
        state, sixth = json.loads(json.dumps(plain.state())), next(plain)
        plain.restore(state)
        assert same(next(plain), sixth)
        ahead.restore(state)  # what its thread has read is forgotten
        assert same(next(ahead), sixth) and same(next(ahead), next(plain))


def test_a_row_is_always_of_the_same_shard(config):
    """Rows of other shards are not touched: a batch of two rows a shard has each shard's next two."""
    config = dataclasses.replace(config, shards=6)
    once, twice = [], []
    with make_loader(config, batch=6, seq=SEQ) as loader:
        once = [next(loader) for _ in range(4)]
    with make_loader(config, batch=12, seq=SEQ) as loader:
        twice = [next(loader) for _ in range(2)]
    for row in range(6):
        one = [batch.tokens[row].tolist() for batch in once]
        two = [batch.tokens[2 * row + half].tolist() for batch in twice for half in (0, 1)]
        assert one == two


def test_state_is_small(config):
    with make_loader(config, batch=BATCH, seq=SEQ) as loader:
        for _ in range(10):
            next(loader)
        assert len(json.dumps(loader.state()["shards"])) / BATCH < 400


def test_states_that_do_not_fit_are_refused(config, web):
    with make_loader(config, batch=BATCH, seq=SEQ, process_index=0, process_count=2) as half:
        next(half)
        state = half.state()
    with make_loader(config, batch=BATCH, seq=SEQ) as loader:
        with pytest.raises(DataError, match="the state has no shard 6: accepted is that of all processes together"):
            loader.restore(state)
        with pytest.raises(DataError, match="states differ in batches: 1 and 0: accepted are those of one run"):
            merge_states([state, loader.state()])
    for change, name, key in (
        ({"seed": 6}, "seed", "seed"),
        ({"shards": 6}, "shard_count", r"data.shards \(a divisor of every stage's batch\)"),
        ({"waiting": 5}, "waiting", "data.waiting"),
        ({"sources": (Source("web", web),)}, "sources", "data.sources and stages.NAME.mixture"),
    ):
        with make_loader(dataclasses.replace(config, **change), batch=BATCH, seq=SEQ) as other:
            with pytest.raises(DataError, match=f"the state has {name} .*: accepted is the same, by {key} in a run's file"):
                other.restore(state)
    with pytest.raises(DataError, match="the loader is closed"):
        next(loader)
    with pytest.raises(DataError, match="no states"):
        merge_states([])

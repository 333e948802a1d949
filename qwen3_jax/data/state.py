"""States of a loader, as JSON has them: joined over processes, checked against a mixture, carried over into another one.

A state is what the mixture was (version, seed, seq, shard_count, waiting, sources), how many batches there were, and by number
what each logical shard has: rows and used slots so far, documents and slots drawn of each source, and the pieces that wait.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from qwen3_jax.data.files import DataError

VERSION = 1
# What a run's file calls the fields of a state.
_KEYS = {
    "seed": "seed",
    "seq": "stages.NAME.seq",
    "shard_count": "data.shards (a divisor of every stage's batch)",
    "waiting": "data.waiting",
    "sources": "data.sources and stages.NAME.mixture",
}


def short(value: Any) -> str:
    """A value for a message."""
    text = repr(value)
    return text if len(text) < 300 else text[:300] + "..."


def merge_states(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One state of all processes.

    Args:
        states: each process's, taken after the same batch.

    Returns:
        A state that any process of any number restores from.

    Raises:
        DataError: no states, or states that differ in more than their shards.
    """
    if not states:
        raise DataError("no states: accepted is one of each process")
    merged = dict(states[0]) | {"shards": {}}
    for state in states:
        for name in merged.keys() - {"shards"}:
            if state.get(name) != merged[name]:
                raise DataError(
                    f"states differ in {name}: {short(merged[name])} and {short(state.get(name))}: accepted are those of one "
                    "run, taken after the same batch"
                )
        merged["shards"] |= state["shards"]
    return merged


def restored(mixture: Mapping[str, Any], state: Mapping[str, Any], wanted: Iterable[str]) -> dict[str, Any]:
    """What a process goes on from, of a state of the same mixture.

    Args:
        mixture: what the loader's is.
        state: of all processes.
        wanted: numbers of the process's shards.

    Returns:
        Batches, and those shards.

    Raises:
        DataError: another mixture, by the field that differs, or a shard that is not there.
    """
    _check_same(mixture, state, mixture)
    return {"batches": state["batches"], "shards": _shards(state, wanted)}


def carried(mixture: Mapping[str, Any], state: Mapping[str, Any], wanted: Iterable[str]) -> dict[str, Any]:
    """Where a mixture begins after another one: its sources go on where they were, new ones begin.

    Args:
        mixture: what the loader's is.
        state: of all processes, of the mixture before.
        wanted: numbers of the process's shards.

    Returns:
        Shards that have drawn what they had drawn, and keep what waits of sources that are still there; nothing else is
        counted.

    Raises:
        DataError: another seed or number of shards, for these say which documents are next; or a source with other documents.
    """
    _check_same(mixture, state, ("version", "seed", "shard_count"))
    before = {source["name"]: (at, source) for at, source in enumerate(state["sources"])}
    places: list[int | None] = []
    for source in mixture["sources"]:
        at, was = before.get(source["name"], (None, source))
        for field in ("min_tokens", "max_tokens", "documents", "tokens", "tokenizer"):
            if was[field] != source[field]:
                raise DataError(
                    f"source {source['name']} had {field} {was[field]} and has {source[field]}: accepted is the same, or "
                    "another name"
                )
        places.append(at)
    now = {at: number for number, at in enumerate(places) if at is not None}
    shards = {}
    for number, shard in _shards(state, wanted).items():
        drawn = [0 if at is None else shard["drawn"][at] for at in places]
        held = [[now[source], *piece] for source, *piece in shard["held"] if source in now]
        shards[number] = {"rows": 0, "used": 0, "drawn": drawn, "slots": [0] * len(places), "held": held}
    return {"batches": 0, "shards": shards}


def _check_same(mixture: Mapping[str, Any], state: Mapping[str, Any], names: Iterable[str]) -> None:
    for name in names:
        if (there := state.get(name)) != mixture[name]:
            found = f"the state has {name} {short(there)}, and the loader {short(mixture[name])}"
            key = f", by {_KEYS[name]} in a run's file" if name in _KEYS else ""
            raise DataError(f"{found}: accepted is the same{key}")


def _shards(state: Mapping[str, Any], wanted: Iterable[str]) -> dict[str, Any]:
    held = state["shards"]
    if missing := [number for number in wanted if number not in held]:
        raise DataError(
            f"the state has no shard {missing[0]}: accepted is that of all processes together, as merge_states makes it"
        )
    return {number: held[number] for number in wanted}

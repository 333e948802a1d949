"""Kinds of layers, and the split of a stack of them into segments that one scan each runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

LONGEST_UNIT = 512  # layers of one unit; beyond that an irregular stack is cut into several


@dataclasses.dataclass(frozen=True)
class BlockKind:
    """What a layer is made of: its feed-forward kind, and whether its attention has a sliding window."""

    mlp: Literal["dense", "moe"] = "dense"
    sliding: bool = False


@dataclasses.dataclass(frozen=True)
class Segment:
    """Layers that one scan runs: a unit of kinds, repeated."""

    unit: tuple[BlockKind, ...]
    repeats: int


def split(kinds: Sequence[BlockKind]) -> tuple[Segment, ...]:
    """The split whose scan bodies hold the fewest layers; among those the fewest segments, then the most repeats.

    From the last layer to the first, the best split of the layers from each on is kept. A unit of `size` layers repeats from a
    layer on for as long as each layer equals the one `size` later, so both that run and the best number of repeats follow
    from those `size` layers later: the work is the number of layers times the layers of all bodies, which is small
    for any regular stack.

    Args:
        kinds: of each layer, in order.

    Returns:
        Segments whose units, repeated and joined, are the layers.
    """
    count = len(kinds)
    numbers = {kind: number for number, kind in enumerate(dict.fromkeys(kinds))}
    coded = [numbers[kind] for kind in kinds]
    # best[layer]: (layers in bodies, segments) of the layers from it on; taken[layer]: (size, repeats) of its first segment.
    best = [(0, 0)] * (count + 1)
    taken = [(0, 0)] * count
    # Of each unit size tried so far, index size - 1: the run of equal layers from each layer on, and the best choice there.
    runs: list[list[int]] = []
    choices: list[list[tuple[int, int, int]]] = []

    def visit(size: int, layer: int) -> tuple[int, int, int]:
        """(layers in the rest's bodies, the rest's segments, -repeats), the least over all repeats of a unit that fit."""
        run, choice = runs[size - 1], choices[size - 1]
        end = layer + size
        run[layer] = run[layer + 1] + 1 if end < count and coded[layer] == coded[end] else 0
        found = (*best[end], -1)
        if run[layer] >= size:
            bodies, segments, repeats = choice[end]
            found = min(found, (bodies, segments, repeats - 1))
        choice[layer] = found
        return found

    for layer in reversed(range(count)):
        least, widest = (count + 1, 0, 0, 0), min(count - layer, LONGEST_UNIT)
        for size in range(1, widest + 1):
            if size > least[0]:
                break  # a longer unit alone already costs more
            if size > len(runs):
                runs.append([0] * (count + 1))
                choices.append([(0, 0, 0)] * (count + 1))
                for later in reversed(range(layer + 1, count - size + 1)):
                    visit(size, later)
            bodies, segments, repeats = visit(size, layer)
            least = min(least, (bodies + size, segments + 1, repeats, size))
        for other in range(size, min(len(runs), count - layer) + 1):
            visit(other, layer)
        best[layer], taken[layer] = least[:2], (least[3], -least[2])
    segments, layer = [], 0
    while layer < count:
        size, repeats = taken[layer]
        segments.append(Segment(tuple(kinds[layer : layer + size]), repeats))
        layer += size * repeats
    return tuple(segments)

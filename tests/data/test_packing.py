import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3_jax.data.packing import Packer, Piece


def stream(lengths):
    """Documents of these lengths, over and over; and how many have been drawn."""
    drawn = []

    def draw():
        number = len(drawn)
        drawn.append(number)
        return Piece(0, number, 0, lengths[number % len(lengths)])

    return draw, drawn


ROWS = st.tuples(st.lists(st.integers(1, 50), min_size=1, max_size=30), st.integers(1, 40), st.integers(1, 8))


@settings(max_examples=200, deadline=None)
@given(ROWS)
def test_every_slot_of_every_document_is_in_one_row_or_waits(case):
    lengths, slots, waiting = case
    draw, drawn = stream(lengths)
    packer = Packer(slots, waiting, draw)
    seen = Counter()
    for _ in range(40):
        row = packer.row()
        assert 1 <= sum(piece.slots for piece in row) <= slots
        for piece in row:
            seen.update((piece.document, slot) for slot in range(piece.start, piece.start + piece.slots))
    for piece in packer.held:
        seen.update((piece.document, slot) for slot in range(piece.start, piece.start + piece.slots))
    assert seen == Counter((number, slot) for number in drawn for slot in range(lengths[number % len(lengths)]))
    assert len(packer.held) <= waiting + 1


@settings(max_examples=100, deadline=None)
@given(ROWS)
def test_nothing_is_cut_that_fits_a_row_and_nothing_waits_for_ever(case):
    lengths, slots, waiting = case
    draw, drawn = stream(lengths)
    packer = Packer(slots, waiting, draw)
    drawn_at, begun = {}, set()
    for row_number in range(60):
        row = packer.row()
        drawn_at |= {number: row_number for number in drawn if number not in drawn_at}
        for piece in row:
            length = lengths[piece.document % len(lengths)]
            if length <= slots:
                assert (piece.start, piece.slots) == (0, length)
            else:
                assert piece.slots == min(slots, length - piece.start) and piece.start % slots == 0
            if piece.start == 0:
                begun.add(piece.document)
                assert row_number - drawn_at[piece.document] <= waiting + 1


@settings(max_examples=100, deadline=None)
@given(ROWS, st.integers(0, 20))
def test_held_pieces_and_the_stream_are_all_of_the_state(case, point):
    lengths, slots, waiting = case
    draw, drawn = stream(lengths)
    packer = Packer(slots, waiting, draw)
    for _ in range(point):
        packer.row()
    again, also_drawn = stream(lengths)
    also_drawn += drawn
    other = Packer(slots, waiting, again, packer.held)
    assert [packer.row() for _ in range(10)] == [other.row() for _ in range(10)]


def test_a_row_is_filled_from_what_waits_longest_first_then_by_the_longest_that_fits():
    lengths = iter([9, 7, 4, 3, 5, 2, 9, 9, 9])
    numbers = iter(range(9))
    packer = Packer(10, 3, lambda: Piece(0, next(numbers), 0, next(lengths)))
    # 9 leaves 1: 7, 4 and 3 wait. Then 7 with 3. Then 4, with the 5 that is next in the stream; neither 2 nor two of 9 fit.
    assert [[piece.slots for piece in packer.row()] for _ in range(3)] == [[9], [7, 3], [4, 5]]
    assert [piece.slots for piece in packer.held] == [2, 9, 9]


def test_a_document_longer_than_a_row_goes_on_behind_those_that_wait():
    lengths = iter([25, 4, 10, 10])
    numbers = iter(range(4))
    packer = Packer(10, 2, lambda: Piece(0, next(numbers), 0, next(lengths)))
    packer.held = [Piece(0, 9, 0, 25), Piece(0, 8, 0, 10)]
    assert packer.row() == [(0, 9, 0, 10)]
    assert packer.row() == [(0, 8, 0, 10)]
    assert packer.row() == [(0, 9, 10, 10)]
    assert packer.row()[0] == (0, 9, 20, 5)


@pytest.mark.parametrize("slots", [2048, 4096])
def test_short_documents_fill_more_than_97_of_100_slots(slots):
    draw = random.Random(0)
    lengths = [max(1, int(draw.lognormvariate(5.5, 1.0))) for _ in range(20_000)]  # a median of 245, a mean of 400
    stream_draw, _ = stream([min(length, slots) for length in lengths])
    packer = Packer(slots, 32, stream_draw)
    used = sum(piece.slots for _ in range(300) for piece in packer.row())
    assert used / (300 * slots) > 0.99

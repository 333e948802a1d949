"""Batches of the tests' mixture, and how they are compared."""

import jax
import numpy as np

from qwen3_jax.data.loader import make_loader

BATCH, SEQ = 12, 64


def digits(number, length):
    """A text of `length` tokens, end of text included: a digit is a token, and the first ones are the number."""
    text = str(number).rjust(6, "0")
    return (text * (length // 6 + 1))[: length - 1]


def batches(config, count, **settings):
    with make_loader(config, batch=BATCH, seq=SEQ, **settings) as loader:
        return [next(loader) for _ in range(count)]


def same(one, two):
    return all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True))


def rows_of(batch, rows):
    return jax.tree.map(lambda leaf: leaf[list(rows)], batch)


def spans(batch):
    """Each segment's tokens and labels, row by row."""
    for tokens, labels, segments in zip(batch.tokens, batch.labels, batch.segment_ids, strict=True):
        for number in range(1, segments.max() + 1):
            yield tokens[segments == number].tolist(), labels[segments == number].tolist()

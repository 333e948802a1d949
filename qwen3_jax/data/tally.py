"""What is counted of records: how many, which were bad, and when there are too many of these."""

from __future__ import annotations

import collections
import dataclasses
import functools

from qwen3_jax.data.files import DataError, open_file
from qwen3_jax.data.records import BadRecord
from qwen3_jax.data.sources import Part

LEAST_RECORDS = 1000  # before a rate is one
_UNITS = {"jsonl": ":{}", "text": ":{}", "parquet": ", row {}", "array_record": ", record {}"}


class TooManyBadRecords(DataError):
    """More bad records than the chosen rate allows."""


@dataclasses.dataclass(frozen=True)
class Fault:
    """A bad record. As text it is `FILE:LINE: KIND: FOUND`, lines counted from 1.

    Attributes:
        path: of its file.
        format: of its file.
        start: byte at which the stretch begins that it was read in.
        number: its number there, from 0.
        what: is wrong.
    """

    path: str
    format: str
    start: int
    number: int
    what: str

    def __str__(self) -> str:
        # Lines before a stretch are counted for the few faults that are shown, and not by the workers.
        line = self.number + 1 + (_lines_before(self.path, self.start) if self.start else 0)
        return f"{self.path}{_UNITS[self.format].format(line)}: {self.what}"


@functools.lru_cache(maxsize=64)
def _lines_before(path: str, start: int) -> int:
    """Lines of a file that begin before a byte."""
    with open_file(path) as stream:
        left, count, last = start, 0, b"\n"
        while left and (block := stream.read(min(left, 1 << 20))):
            count += block.count(b"\n")
            left -= len(block)
            last = block[-1:]
    return count + (last != b"\n")


@dataclasses.dataclass
class Tally:
    """Records seen, and the bad ones among them.

    Attributes:
        records: all that were seen, bad ones too.
        bad: how many of each kind.
        first: the first bad ones.
    """

    records: int = 0
    bad: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    first: list[Fault] = dataclasses.field(default_factory=list)
    named: int = 10

    def take(self, part: Part, number: int, error: BadRecord) -> None:
        """Count a bad record, and keep it if it is among the first.

        Args:
            part: where it was read.
            number: its number there.
            error: what it is.
        """
        self.bad[error.kind] += 1
        if len(self.first) < self.named:
            self.first.append(Fault(part.file.path, part.file.format, part.start, number, str(error)[:400]))

    def check(self, rate: float, least: int = LEAST_RECORDS) -> None:
        """Refuse more bad records than a rate.

        Args:
            rate: bad ones among all, 0 to 1.
            least: records below which nothing is said.

        Raises:
            TooManyBadRecords: with the counts and the first ones.
        """
        count = self.bad.total()
        if self.records < least or count <= rate * self.records:
            return
        kinds = ", ".join(f"{number} {kind}" for kind, number in self.bad.most_common())
        first = "\n  ".join(map(str, self.first))
        raise TooManyBadRecords(
            f"{count} of {self.records} records are bad ({kinds}); accepted is a rate of {rate:g} (--max-bad-rate). "
            f"The first:\n  {first}"
        )

import gzip
import re
import tempfile
from pathlib import Path
from typing import Any

import fsspec
import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from array_record.python.array_record_module import ArrayRecordWriter
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3_jax.data.files import DataError, File, find_files
from qwen3_jax.data.records import BadRecord
from qwen3_jax.data.sources import Part, pieces, records
from qwen3_jax.data.tally import Tally, _lines_before

LINES = b'{"text": "one"}\n{"text": "two"}\r\n{"text": "three"}'


def long_window(content):
    """As `zstd --long=28` writes a stream: with a window that decompressors refuse unless told."""
    stream = zstandard.ZstdCompressor(compression_params=zstandard.ZstdCompressionParameters(window_log=28)).compressobj()
    return stream.compress(content) + stream.flush()


def only(path):
    (file,) = find_files([str(path)])
    return file


def read(path, **settings):
    return [record for part in pieces([only(path)], 1 << 30)[0].parts for _, record in records(part, **settings)]


def test_a_folder_gives_its_known_files_sorted_without_hidden_ones(tmp_path):
    for name in (
        "b.jsonl",
        "a/c.txt.gz",
        "z.parquet",
        "_SUCCESS",
        ".git/x.jsonl",
        "read.py",
        "README.md",
        "infos.json",
        "d.JSONL.zst",
        "e.array_record",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"1")
    found = find_files([str(tmp_path)])
    assert [(file.path[len(str(tmp_path)) + 1 :], file.format, file.compression, file.size) for file in found] == [
        ("a/c.txt.gz", "text", "gzip", 1),
        ("b.jsonl", "jsonl", None, 1),
        ("d.JSONL.zst", "jsonl", "zstd", 1),
        ("e.array_record", "array_record", None, 1),
        ("z.parquet", "parquet", None, 1),
    ]
    (tmp_path / "link.json").symlink_to(tmp_path / "infos.json")
    (tmp_path / "folder.json").symlink_to(tmp_path / "a")
    (tmp_path / "nowhere.json").symlink_to(tmp_path / "none")
    patterns = [str(tmp_path / "*.jsonl"), str(tmp_path / "a"), str(tmp_path / "*.json"), str(tmp_path / "README.md")]
    assert [file.name for file in find_files(patterns)] == ["b.jsonl", "c.txt.gz", "infos.json", "link.json", "README.md"]
    assert [file.size for file in find_files(patterns)] == [1] * 5


@pytest.mark.parametrize(
    "sources, message",
    [
        (["{}/none.jsonl"], "none.jsonl is not there"),
        (["{}/*.parquet"], "no file to read: accepted are names that end in .jsonl"),
        (["{}/**.jsonl"], r"\*\*.jsonl: Invalid pattern: .*; accepted are patterns as \*.jsonl and \*\*/\*.jsonl"),
        (["{}/a.py"], "a.py has an unknown format"),
        (["{}/a.parquet.gz"], "a.parquet.gz has an unknown format"),
        (["{}/a.jsonl", "{}/a.jsonl"], "a.jsonl is named twice"),
        ([], "sources is empty: accepted is at least one file"),
        (["nowhere://a.jsonl"], "of no known protocol"),
        (["gs://bucket/a.jsonl"], "needs a library that is not installed: .*gcsfs"),
    ],
)
def test_sources_that_are_refused(tmp_path, sources, message):
    for name in ("a.jsonl", "a.py", "a.parquet.gz"):
        (tmp_path / name).write_bytes(b"1")
    with pytest.raises(DataError, match=message):
        find_files([source.format(tmp_path) for source in sources])


def test_a_store_is_read_as_a_disk_is(tmp_path):
    store = fsspec.filesystem("memory")
    store.pipe({"/bucket/a.jsonl": LINES, "/bucket/sub/b.jsonl.gz": gzip.compress(LINES), "/bucket/c.txt": b"whole"})
    try:
        files = find_files(["memory://bucket"])
        assert [file.path for file in files] == [
            "memory:///bucket/a.jsonl",
            "memory:///bucket/c.txt",
            "memory:///bucket/sub/b.jsonl.gz",
        ]
        found = [[record for _, record in records(Part(file))] for file in files]
        assert found[0] == found[2] == [{"text": "one"}, {"text": "two"}, {"text": "three"}]
        assert found[1] == ["whole"]
    finally:
        store.rm("/bucket", recursive=True)


def test_parquet_and_array_records_of_a_store(tmp_path):
    """ArrayRecord's reader opens local files alone: it gets a copy, and the copy goes again."""
    pyarrow.parquet.write_table(pyarrow.table({"text": ["one"]}), tmp_path / "a.parquet")
    writer = ArrayRecordWriter(str(tmp_path / "b.array_record"), "group_size:1")
    writer.write(b'{"text": "two"}')
    writer.close()
    store = fsspec.filesystem("memory")
    store.pipe({f"/bucket/{file.name}": file.read_bytes() for file in tmp_path.iterdir()})
    before = set(Path(tempfile.gettempdir()).glob("qwen3-jax-data-*"))
    try:
        assert [record for file in find_files(["memory://bucket"]) for _, record in records(Part(file))] == [
            {"text": "one"},
            {"text": "two"},
        ]
    finally:
        store.rm("/bucket", recursive=True)
    assert set(Path(tempfile.gettempdir()).glob("qwen3-jax-data-*")) == before


@pytest.mark.parametrize(
    "name, content",
    [
        ("a.jsonl", LINES),
        ("bom.jsonl", b"\xef\xbb\xbf" + LINES),
        ("a.jsonl.gz", gzip.compress(LINES)),
        ("members.jsonl.gz", gzip.compress(LINES[:20]) + gzip.compress(b"") + gzip.compress(LINES[20:])),
        ("a.jsonl.zst", zstandard.compress(LINES)),
        ("long.jsonl.zst", long_window(LINES)),
        ("frames.json.zst", zstandard.compress(LINES[:20]) + zstandard.compress(LINES[20:])),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_lines_are_the_same_in_every_compression(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert read(tmp_path / name) == [{"text": "one"}, {"text": "two"}, {"text": "three"}]


# With a checksum, as the zstd command writes it; without one damage may go unseen.
ZSTD = zstandard.ZstdCompressor(write_checksum=True)


@pytest.mark.parametrize("name, compress", [("a.jsonl.gz", gzip.compress), ("a.jsonl.zst", ZSTD.compress)])
def test_a_stream_that_is_cut_off_or_damaged_is_no_end(tmp_path, name, compress):
    content = compress(b"".join(b'{"text": "%d"}\n' % (number * 7919) for number in range(3000)))
    file = tmp_path / name
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match="is cut off"):
        read(file)
    file.write_bytes(content[:100] + bytes(400) + content[500:])
    with pytest.raises(DataError, match=f"{name} is no (gzip|zstd) file, or damaged"):
        read(file)


def test_text_files_are_documents_whole_or_by_line(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\n\ntwo\n")
    assert read(tmp_path / "a.txt") == ["one\n\ntwo\n"]
    assert read(tmp_path / "a.txt", text_document="line") == ["one", "", "two"]


def test_a_text_that_is_no_utf8_is_a_bad_record(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    (bad,) = read(tmp_path / "a.txt")
    assert isinstance(bad, BadRecord) and bad.kind == "not UTF-8"


def named(part, number):
    """How a bad record there would be named."""
    tally = Tally()
    tally.take(part, number, BadRecord("empty", "it"))
    return str(tally.first[0]).removesuffix(": empty: it")


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=20), st.integers(1, 80), st.booleans())
def test_stretches_of_a_file_have_each_line_once_and_know_its_number(tmp_path_factory, lengths, piece_bytes, ends):
    file = tmp_path_factory.getbasetemp() / "stretches.jsonl"
    lines = [b'{"n":%d,"x":"%s"}' % (number, b"x" * length) for number, length in enumerate(lengths)]
    file.write_bytes(b"\n".join(lines) + (b"\n" if ends else b""))
    _lines_before.cache_clear()  # it trusts that files do not change
    parts = [part for piece in pieces([only(file)], piece_bytes) for part in piece.parts]
    assert parts[0].start == 0 and sum(part.size for part in parts) == file.stat().st_size
    found = [(record["n"], named(part, number)) for part in parts for number, record in records(part)]
    assert found == [(number, f"{file}:{number + 1}") for number in range(len(lines))]


def test_pieces_group_small_files_and_cut_large_lines_files_alone():
    sizes: list[tuple[str, Any, str | None, int]] = [
        ("a.jsonl", "jsonl", None, 250),
        ("b.jsonl", "jsonl", "gzip", 250),
        ("c", "text", None, 10),
        ("d", "text", None, 80),
    ]
    files = [File(name, size, kind, compression) for name, kind, compression, size in sizes]
    found = [[(part.file.path, part.start, part.stop) for part in piece.parts] for piece in pieces(files, 100)]
    assert found == [
        [("a.jsonl", 0, 100)],
        [("a.jsonl", 100, 200)],
        [("a.jsonl", 200, 250)],
        [("b.jsonl", 0, None)],
        [("c", 0, None), ("d", 0, None)],
    ]


@pytest.mark.parametrize("name", ["a.parquet", "a.array_record"])
def test_what_is_no_such_file_is_an_error_and_no_empty_file(tmp_path, name):
    (tmp_path / name).write_bytes(b"not what it says" * 10_000)
    with pytest.raises(DataError, match=f"{re.escape(name)} is no (Parquet file|ArrayRecord), or damaged"):
        read(tmp_path / name)

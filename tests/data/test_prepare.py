import dataclasses
import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from array_record.python.array_record_module import ArrayRecordWriter

from qwen3_jax.cli.main import main
from qwen3_jax.data.encoding import record_bytes, record_tokens
from qwen3_jax.data.files import DataError
from qwen3_jax.data.prepare import _alone, prepare
from qwen3_jax.data.prepared import Prepared
from qwen3_jax.data.worker import Work

TEXTS = ["one", "zwei\nund mehr", "trois <|endoftext|> ici", "def read(path):"]
ROOT = Path(__file__).parents[2]


def files(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def documents(folder):
    prepared = Prepared(folder)
    return [record_tokens(record)[0].tolist() for record in prepared.read(range(len(prepared)))]


@pytest.fixture
def work(tokenizer_folder):
    return Work(str(tokenizer_folder))


def write(file, texts):
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    if file.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.table({"id": range(len(texts)), "text": texts}), file)
    elif file.suffix == ".array_record":
        writer = ArrayRecordWriter(str(file), "group_size:2")
        for line in lines.splitlines():
            writer.write(line)
        writer.close()
    else:
        file.write_bytes({".gz": gzip.compress, ".zst": zstandard.compress}.get(file.suffix, bytes)(lines))


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet", "a.array_record"])
def test_every_form_gives_the_same_tokens(tmp_path, work, tok, name):
    write(tmp_path / name, TEXTS)
    total = prepare([str(tmp_path / name)], tmp_path / "out", work, workers=0)
    expected = [tok.encode(text) + tok.encode("<|endoftext|>") for text in TEXTS]
    assert documents(tmp_path / "out") == expected
    assert Prepared(tmp_path / "out").lengths.tolist() == [len(ids) for ids in expected]
    assert total.figures.tokens == total.figures.targets == sum(map(len, expected))
    assert (total.figures.documents, total.tally.records, total.done) == (4, 4, 1)


def test_rows_of_parquet_may_be_conversations_and_bad_ones_are_named(tmp_path, work, tok):
    messages = [{"role": "user", "content": "?", "name": None}, {"role": "assistant", "content": "!", "name": None}]
    table = pyarrow.table({"messages": [messages, [], messages], "score": [1.0, 2.0, 3.0]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    total = prepare([str(tmp_path / "a.parquet")], tmp_path / "out", work, workers=0, max_bad_rate=0.5)
    assert [str(fault) for fault in total.tally.first] == [f"{tmp_path / 'a.parquet'}, row 2: empty: messages is an empty list"]
    assert documents(tmp_path / "out") == [tok.apply_chat_template(messages)] * 2
    assert total.figures.conversations == 2
    pyarrow.parquet.write_table(pyarrow.table({"score": [1.0]}), tmp_path / "b.parquet")
    with pytest.raises(DataError, match="b.parquet has columns score: accepted is one with messages or conversations or text"):
        prepare([str(tmp_path / "b.parquet")], tmp_path / "other", work, workers=0)


def test_no_end_token_and_one_that_is_none(tmp_path, work, tok, tokenizer_folder):
    write(tmp_path / "a.jsonl", TEXTS)
    prepare([str(tmp_path / "a.jsonl")], tmp_path / "out", Work(str(tokenizer_folder), end_token=None), workers=0)
    assert documents(tmp_path / "out") == [tok.encode(text) for text in TEXTS]
    with pytest.raises(DataError, match="end_token is '</s>', which is 4 tokens: accepted is one of the vocabulary"):
        prepare([str(tmp_path / "a.jsonl")], tmp_path / "other", Work(str(tokenizer_folder), end_token="</s>"), workers=0)


def test_tokens_and_targets_go_through_the_stored_form():
    ids, targets = record_tokens(record_bytes([0, 151_935, 2**31 - 1], [False, True, False]))
    assert ids.tolist() == [0, 151_935, 2**31 - 1] and ids.dtype == np.int32
    assert targets.tolist() == [False, True, False]
    assert record_bytes([7, 8]) == b"\7\0\0\0\x08\0\0\0"


def test_processes_write_what_one_writes_and_tell_of_it(tmp_path, work):
    (tmp_path / "in").mkdir()
    for number in range(3):
        write(tmp_path / "in" / f"{number}.jsonl", [f"{number} {at} text" for at in range(40)])
    told = []
    for folder, workers in (("one", 0), ("two", 2)):
        source = [str(tmp_path / "in")]
        total = prepare(source, tmp_path / folder, work, workers=workers, piece_bytes=500, progress=told.append)
    assert files(tmp_path / "one") == files(tmp_path / "two")
    assert len(list((tmp_path / "one").glob("*.array_record"))) == total.pieces == 6
    assert told[-1] == total and total.done == 6 and total.read == total.size
    assert total.figures.documents == 120


def test_what_is_done_is_not_done_again(tmp_path, work):
    write(tmp_path / "a.jsonl", TEXTS * 20)
    arguments = ([str(tmp_path / "a.jsonl")], tmp_path / "out", work)
    prepare(*arguments, workers=0, piece_bytes=1000)
    before = files(tmp_path / "out")
    times = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "out").glob("part-*")}
    (tmp_path / "out" / "part-00001.json").unlink()  # its documents are there, but nobody says that they are whole
    (tmp_path / "out" / "part-00002.array_record").write_bytes(b"cut")
    (tmp_path / "out" / ".part-00002.array_record.0123.tmp").write_bytes(b"left by a killed worker")
    prepare(*arguments, workers=0, piece_bytes=1000)
    assert files(tmp_path / "out") == before
    again = {file.name for file in (tmp_path / "out").glob("part-*") if file.stat().st_mtime_ns != times[file.name]}
    assert again == {f"part-0000{number}.{ending}" for number in (1, 2) for ending in ("array_record", "lengths.npy", "json")}


def test_a_folder_of_another_run_is_refused_until_it_is_overwritten(tmp_path, work, tokenizer_folder):
    write(tmp_path / "a.jsonl", TEXTS)
    source, out = [str(tmp_path / "a.jsonl")], tmp_path / "out"
    prepare(source, out, work, workers=0, piece_bytes=30)
    other = Work(str(tokenizer_folder), end_token=None)
    with pytest.raises(
        DataError, match=r"another end_token: <\|endoftext\|> there, None here: accepted is the same, or to begin anew"
    ):
        prepare(source, out, other, workers=0, piece_bytes=30)
    prepare(source, out, other, workers=0, overwrite=True)
    assert sorted(files(out)) == [
        ".lock",
        "dataset.json",
        "part-00000.array_record",
        "part-00000.json",
        "part-00000.lengths.npy",
        "plan.json",
    ]
    with pytest.raises(DataError, match="another template: .{64} there"):
        prepare(source, out, dataclasses.replace(other, family="coder"), workers=0)
    write(tmp_path / "a.jsonl", [*TEXTS, "more"])
    with pytest.raises(DataError, match="holds a run with another set of files: .*a.jsonl', 1.*a.jsonl', 1"):
        prepare(source, out, other, workers=0)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").write_text("mine")
    with pytest.raises(DataError, match="holds notes, which is of no such run: accepted is a new or empty folder"):
        prepare(source, tmp_path / "mine", work, workers=0, overwrite=True)


def test_bad_settings_and_sources_are_refused_and_workers_say_why(tmp_path, work):
    write(tmp_path / "a.jsonl", TEXTS)
    source = [str(tmp_path / "a.jsonl")]
    with pytest.raises(DataError, match="workers is -1: accepted is at least 0"):
        prepare(source, tmp_path / "out", work, workers=-1)
    with pytest.raises(DataError, match="max_bad_rate is 1.5: accepted is 0 to 1"):
        prepare(source, tmp_path / "out", work, max_bad_rate=1.5)
    with pytest.raises(DataError, match="piece_bytes is 0: accepted is at least 1"):
        prepare(source, tmp_path / "out", work, piece_bytes=0)
    with pytest.raises(DataError, match="gs://x/y is in a store: accepted is a folder on a disk"):
        prepare(source, "gs://x/y", work)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b'{"text": "x"}\n' * 100)[:-9])
    with pytest.raises(DataError, match="b.jsonl.gz is cut off"):
        prepare([str(tmp_path / "*.*")], tmp_path / "out", work, workers=2, piece_bytes=10)
    write(tmp_path / "out" / "inside.jsonl", TEXTS)
    for source in (tmp_path, tmp_path / "out" / "inside.jsonl"):
        with pytest.raises(DataError, match="lies within the source .*: accepted is a folder apart from all sources"):
            prepare([str(source)], tmp_path / "out", work)
    (tmp_path / "c.jsonl").write_bytes(b"{\n")
    with pytest.raises(DataError, match="no document came of 1 records"):
        prepare([str(tmp_path / "c.jsonl")], tmp_path / "none", work, workers=0, max_bad_rate=1.0)


def test_a_disk_that_takes_no_more_is_said_and_leaves_no_part(tmp_path, tokenizer_folder):
    """Files of at most 70 kB: ArrayRecord's header alone takes 64 KiB."""
    write(tmp_path / "a.jsonl", [f"{number} and {number * number} words" for number in range(5000)])
    code = (
        "import resource, sys; from qwen3_jax.cli.main import main;"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (70_000, 70_000));"
        f"sys.exit(main(['data', 'prepare', {str(tmp_path / 'a.jsonl')!r}, '--tokenizer', {str(tokenizer_folder)!r},"
        f" '--out', {str(tmp_path / 'out')!r}, '--workers', '1']))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "part-00000.array_record could not be written: write() failed: File too large" in done.stderr
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [".lock", "plan.json"]


def test_one_run_at_a_time(tmp_path, work):
    write(tmp_path / "a.jsonl", TEXTS)
    (tmp_path / "out").mkdir()
    with _alone(tmp_path / "out"), pytest.raises(DataError, match="out: another run writes there: accepted is one at a time"):
        prepare([str(tmp_path / "a.jsonl")], tmp_path / "out", work, workers=0)
    assert prepare([str(tmp_path / "a.jsonl")], tmp_path / "out", work, workers=0).done == 1


def _children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _lives(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


# A run that stands still once two parts are done, while its workers go on with what they have.
STILL = """
import sys, time
from qwen3_jax.data.prepare import prepare
from qwen3_jax.data.worker import Work

def told(total):
    if total.done >= 2:
        print("two", flush=True)
        time.sleep(600)

source, out, tokenizer = sys.argv[1:]
prepare([source], out, Work(tokenizer), workers=2, piece_bytes=100_000, progress=told)
"""


def test_a_run_that_is_killed_leaves_no_worker_and_goes_on_to_the_same_bytes(tmp_path, tokenizer_folder, work):
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    for number in range(8):
        write(source / f"{number}.jsonl", [f"{number} {at} some words " * 20 for at in range(300)])
    command = [sys.executable, "-c", STILL, source, out, tokenizer_folder]
    process = subprocess.Popen(list(map(str, command)), cwd=ROOT, stdout=subprocess.PIPE, text=True)
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "two\n"
        workers = _children(process.pid)
        os.kill(process.pid, signal.SIGKILL)
    assert len(workers) == 2
    done = sorted(out.glob("part-*.json"))
    assert 2 <= len(done) < 8 and not (out / "dataset.json").exists()
    with pytest.raises(DataError, match="holds a run of `data prepare` that has not ended: run it again"):
        Prepared(out)
    end = time.monotonic() + 60
    while any(map(_lives, workers)) and time.monotonic() < end:
        time.sleep(0.05)
    assert not any(map(_lives, workers))
    times = {file: file.stat().st_mtime_ns for file in done}
    words = ["data", "prepare", source, "--tokenizer", tokenizer_folder, "--out", out, "--piece-bytes", 100_000, "--workers", 0]
    assert main(list(map(str, words))) == 0
    assert {file: file.stat().st_mtime_ns for file in done} == times
    prepare([str(source)], tmp_path / "whole", work, workers=0, piece_bytes=100_000)
    assert files(out) == files(tmp_path / "whole")
    assert len(documents(tmp_path / "whole")) == 2400


def test_the_command_says_what_it_did(tmp_path, tokenizer_folder, capsys, monkeypatch):
    monkeypatch.setattr("qwen3_jax.cli.data._EVERY", -1)
    write(tmp_path / "a.jsonl", TEXTS)
    with (tmp_path / "a.jsonl").open("a") as file:
        file.write("{\n")
    words = ["data", "prepare", str(tmp_path / "a.jsonl"), "--tokenizer", str(tokenizer_folder), "--out", str(tmp_path / "out")]
    assert main([*words, "--workers", "0"]) == 2
    said = capsys.readouterr()
    assert "qwen3-jax data: 1 of 5 records are bad (1 broken JSON); accepted is a rate of 0.01 (--max-bad-rate)" in said.err
    assert main([*words, "--workers", "0", "--max-bad-rate", "0.2"]) == 0
    said = capsys.readouterr().out
    assert "documents  4, of them 0 of conversations" in said
    assert "100%  1/1 parts  4 documents  " in said and "/s  1 bad" in said
    assert "bad        1: 1 broken JSON" in said and f"{tmp_path / 'a.jsonl'}:5: broken JSON" in said
    assert main(["data", "show", str(tmp_path / "out"), "--tokenizer", str(tokenizer_folder), "--document", "1"]) == 0
    said = capsys.readouterr().out
    assert "documents  4 in 1 parts, of them 0 of conversations" in said and "bad        1 broken JSON" in said
    assert "zwei\nund mehr<|endoftext|>" in said
    assert main(["data", "show", str(tmp_path / "out"), "--tokenizer", str(tokenizer_folder), "--document", "4"]) == 2
    assert "document is 4: accepted are 0 to 3" in capsys.readouterr().err
    assert main(["data", "pack"]) == 2
    assert "unknown command 'pack'; commands: prepare, show" in capsys.readouterr().err

"""Headers and indexes, changed in every way: the valid load to known values, the others are refused by what is at fault."""

import json
import random
import re
import struct
import time

import numpy as np
import pytest

from qwen3_jax.checkpoint.reading import CheckpointError
from qwen3_jax.checkpoint.safetensors import Plan, read_header, write_file
from qwen3_jax.checkpoint.source import folder_tensors
from tests.checkpoint.folders import contents, hub_tensors, write
from tests.model.models import CONFIGS


def shuffled(draw: random.Random, content: dict) -> dict:
    names = list(content)
    draw.shuffle(names)
    return {name: content[name] for name in names}


def mutated_index(draw: random.Random, good: dict):
    """A changed index, and a pattern for what is said of it; None where it is still valid."""
    names, files = sorted(good["weight_map"]), sorted(set(good["weight_map"].values()))
    name = draw.choice(names)
    changed = json.loads(json.dumps(good))
    where = changed["weight_map"]
    kind = draw.choice(
        ["order", "metadata", "more keys", "no metadata", "files", "other file", "gone", "outside", "no string", "drop", "add"]
        + ["no map"]
    )
    if kind == "order":
        changed["weight_map"] = shuffled(draw, where)
    elif kind == "metadata":
        changed["metadata"] = draw.choice([{"total_size": 7}, {"total_parameters": 1, "x": []}])
    elif kind == "more keys":
        changed["comment"] = draw.choice(["hello", 1, None])
    elif kind == "no metadata":
        del changed["metadata"]
    elif kind == "files":
        changed = {"weight_map": {key: where[key] for key in sorted(where, key=where.__getitem__)}}
    elif kind == "other file":
        where[name] = draw.choice([file for file in files if file != where[name]])
        return changed, f"disagree about {re.escape(name)}"
    elif kind == "gone":
        where[name] = f"model-{draw.randrange(100, 1000)}.safetensors"
        return changed, f"{re.escape(repr(where[name]))} is not there"
    elif kind == "outside":
        where[name] = draw.choice(["../", "/tmp/", "sub/", "./"]) + where[name]
        return changed, f"{re.escape(repr(where[name]))} points outside the folder"
    elif kind == "no string":
        where[name] = draw.choice([3, None, [], {}])
        return changed, f"index.json: {re.escape(name)} is said to be in {re.escape(repr(where[name]))}"
    elif kind == "drop":
        del where[name]
        return changed, f"disagree about {re.escape(name)}"
    elif kind == "add":
        where[f"{name}.more"] = where[name]
        return changed, f"disagree about {re.escape(name)}.more"
    else:
        changed = draw.choice([{}, {"weight_map": {}}, {"weight_map": []}, [], 7, None])
        return changed, "weight_map" if isinstance(changed, dict) else "no JSON object"
    return changed, None


def test_a_thousand_changed_indexes_are_read_rightly_or_refused(tmp_path):
    config, draw, valid = CONFIGS["dense"], random.Random(6), 0
    write(tmp_path, config, hub_tensors(config), files=3)
    expected = contents(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    text = index.read_text()
    good = json.loads(text)
    for _ in range(1000):
        changed, says = mutated_index(draw, good)
        index.write_text(json.dumps(changed, indent=draw.choice([None, 1])))
        if says is None:
            valid += 1
            assert {name: (t.dtype, t.shape) for name, t in folder_tensors(tmp_path).items()} == {
                name: value[:2] for name, value in expected.items()
            }
            if valid % 20 == 0:
                assert contents(tmp_path) == expected
        else:
            with pytest.raises(CheckpointError, match=says):
                folder_tensors(tmp_path)
    assert valid > 334
    for _ in range(100):  # not JSON at all
        index.write_text(text[: draw.randrange(len(text) - 1)])
        with pytest.raises(CheckpointError, match=r"index\.json is no JSON object"):
            folder_tensors(tmp_path)


WIDER = {"F32": ("I32", "F64"), "I32": ("F32", "I64"), "BF16": ("F16", "F32"), "U8": ("BOOL", "F16")}


def mutated_header(draw: random.Random, header: dict):
    """A changed header, the data's new order or None, and a pattern for what is said of it; None where it is still valid."""
    name = draw.choice(list(header))
    changed = {key: {**value} for key, value in header.items()}
    entry = changed[name]
    begin, end = entry["data_offsets"]
    said = re.escape(name)
    kind = draw.choice(
        [
            "order",
            "order",
            "keys",
            "metadata",
            "type",
            "reshape",
            "reshape",
            "rename",
            "dtype",
            "wider",
            "no shape",
            "shape",
            "begin",
            "end",
        ]
        + ["swap", "drop", "field", "more", "beyond"]
    )
    if kind == "order":
        return shuffled(draw, changed), None
    if kind == "keys":
        return {key: shuffled(draw, value) for key, value in changed.items()}, None
    if kind == "metadata":
        return {"__metadata__": draw.choice([{"format": "np"}, {}, {"a": "b"}]), **changed}, None
    if kind == "type":  # the same bytes as another dtype of that width
        entry["dtype"] = WIDER[entry["dtype"]][0]
        return changed, None
    if kind == "reshape":
        entry["shape"] = draw.choice([[1, *entry["shape"]], entry["shape"][::-1], [int(np.prod(entry["shape"]))]])
        return changed, None
    if kind == "rename":
        return {f"{key}.x" if key == name else key: value for key, value in changed.items()}, None
    if kind == "dtype":
        entry["dtype"] = draw.choice(["F12", 4, None, "f32", []])
        said += rf" has dtype {re.escape(repr(entry['dtype']))}"
    elif kind == "wider":
        entry["dtype"] = WIDER[entry["dtype"]][1]
        said += rf" has {end - begin} bytes; its dtype and shape"
    elif kind == "no shape":
        entry["shape"] = draw.choice([[-1], [3.5], "4", [True], None, 7, {"0": 1}, [2**62, 2**62], [1] * 100, [10**4000]])
        said += r" has shape "
    elif kind == "shape":
        entry["shape"] = draw.choice([[10**9, 10**9], [*entry["shape"], 2], [0]])
        said += r" has (shape|\d+ bytes; its dtype and shape)"
    elif kind in ("begin", "end"):
        entry["data_offsets"] = [begin + draw.choice([4, -4, 10**15]) * (kind == "begin"), end + 4 * (kind == "end")]
        said += r" has (data_offsets|\d+ bytes; its dtype)"
    elif kind == "swap":
        entry["data_offsets"] = draw.choice(
            [[end, begin], [begin], [begin, end, end], {}, None, [begin, "9"], [begin, 10**4000]]
        )
        said += " has data_offsets"
    elif kind == "drop":
        del changed[name]
        said = rf"t\d+ begins at byte {end} and leaves a gap before it, which ends at {begin}|its tensors need"
    elif kind == "field":
        del entry[draw.choice(list(entry))]
        said += " must have dtype, shape and data_offsets"
    elif kind == "more":
        entry["more"] = 1
        said += " must have dtype, shape and data_offsets"
    else:  # sizes agree, but it lies elsewhere: over its neighbour, or behind a gap
        step = draw.choice([-4, 4])
        entry["data_offsets"] = [begin + step, end + step]
        if begin + step < 0:
            said += " has data_offsets"
        else:
            said = r"t\d+ begins at byte \d+ and (overlaps|leaves)|its tensors need"
    return changed, said


def test_three_thousand_changed_headers_are_read_rightly_or_refused(tmp_path):
    draw, valid, kinds = random.Random(5), 0, ("<f4", "<i4", "<f4", "u1", "<f4")
    arrays = {f"t{i}": np.arange(i * 12 + 4, dtype=kind).reshape(-1, 2) for i, kind in enumerate(kinds)}
    plan = Plan(tmp_path / "good.safetensors", {name: (value.dtype, value.shape) for name, value in arrays.items()})
    write_file(plan, iter(arrays.values()))
    raw = plan.file.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + length])
    header.pop("__metadata__")
    data = raw[8 + length :]
    file = tmp_path / "changed.safetensors"
    for _ in range(3000):
        changed, says = mutated_header(draw, header)
        text = json.dumps(changed, indent=draw.choice([None, 1])).encode() + b" " * draw.randrange(3)
        cut = draw.random() < 0.05
        file.write_bytes(struct.pack("<Q", len(text)) + text + (data[:-1] if cut else data))
        if says is None and not cut:
            valid += 1
            found = read_header(file)
            assert {name.removesuffix(".x") for name in found} == set(arrays)
            for name, tensor in found.items():
                value = tensor.read()
                entry, expected = changed[name], arrays[name.removesuffix(".x")]
                assert list(value.shape) == entry["shape"]
                assert value.tobytes() == expected.tobytes()
        else:
            whole = says if says else r"its tensors need \d+ bytes, the file has"
            with pytest.raises(CheckpointError, match=f"changed.safetensors: ({whole})"):
                read_header(file)
    assert valid > 1000
    for broken in (b"", b"12345", struct.pack("<Q", 2**60) + b"{}", struct.pack("<Q", 2) + b"[]", struct.pack("<Q", 2) + b"{x"):
        file.write_bytes(broken)
        with pytest.raises(CheckpointError, match="changed.safetensors"):
            read_header(file)


def with_header(file, text: str, data: int):
    file.write_bytes(struct.pack("<Q", len(text)) + text.encode() + bytes(data))


def test_tensors_that_overlap_are_refused_though_all_sizes_agree(tmp_path):
    """Each tensor's size is right, the last ends where the file does: only their order shows that two share bytes."""

    def entry(begin, end):
        return {"dtype": "F32", "shape": [(end - begin) // 4], "data_offsets": [begin, end]}

    file = tmp_path / "x.safetensors"
    with_header(file, json.dumps({"a": entry(0, 32), "b": entry(24, 48), "c": entry(48, 64)}), 64)
    with pytest.raises(CheckpointError, match="b begins at byte 24 and overlaps the tensor before it, which ends at 32"):
        read_header(file)
    with_header(file, json.dumps({"a": entry(0, 32), "b": entry(0, 32), "c": entry(32, 64)}), 64)
    with pytest.raises(CheckpointError, match="[ab] begins at byte 0 and overlaps the tensor before it, which ends at 32"):
        read_header(file)
    with_header(file, json.dumps({"a": entry(0, 24), "b": entry(32, 64)}), 64)
    with pytest.raises(CheckpointError, match="b begins at byte 32 and leaves a gap before it, which ends at 24"):
        read_header(file)


def test_a_name_that_stands_twice_is_found_at_once(tmp_path):
    entry = '{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    names = [f'"t{i}":{entry}' for i in range(100_000)]
    file = tmp_path / "x.safetensors"
    with_header(file, "{" + ",".join([*names, names[-1]]) + "}", 0)
    start = time.perf_counter()
    with pytest.raises(CheckpointError, match=r"x\.safetensors: its header is no JSON object: 't99999' stands twice"):
        read_header(file)
    assert time.perf_counter() - start < 20
    config = CONFIGS["dense"]
    write(tmp_path, config, hub_tensors(config), files=2)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(index.read_text().replace('"weight_map": {', '"weight_map": {"model.norm.weight": "x", '))
    with pytest.raises(CheckpointError, match=r"index\.json is no JSON object: 'model\.norm\.weight' stands twice"):
        folder_tensors(tmp_path)

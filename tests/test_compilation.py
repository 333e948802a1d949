"""The compilation cache: what a process compiles, the next one finds; another mesh has entries of its own."""

import json
import os
import subprocess
import sys
import zlib

import pytest
import zstandard

from qwen3_jax.compilation import CHECKED, PACKAGES, mend_compilation_cache, use_compilation_cache

START = """
import collections, json, sys
import jax
from jax import monitoring
from flax import nnx
from qwen3_jax import Qwen3, Qwen3Config, generate, make_mesh
from qwen3_jax.compilation import use_compilation_cache

folder, wish = sys.argv[1:]
print(use_compilation_cache(folder), file=sys.stderr)
events = collections.Counter()
monitoring.register_event_listener(lambda name, **more: events.update([name.removeprefix("/jax/compilation_cache/")]))
shape = dict(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=1, head_dim=16)
config = Qwen3Config(**shape, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3)
with jax.set_mesh(make_mesh(wish)):
    model = jax.jit(lambda: Qwen3(config, rngs=nnx.Rngs(0), dtype=jax.numpy.float32))()
tokens = generate(model, [[5, 6, 7]], max_new_tokens=4).tokens.tolist()
print(json.dumps([events["compile_requests_use_cache"], events["cache_hits"], tokens]))
"""


def start(folder, wish):
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    command = [sys.executable, "-c", START, str(folder), wish]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900)
    assert done.returncode == 0, done.stderr
    asked, found, tokens = json.loads(done.stdout)
    return asked, found, tokens, done.stderr


def test_a_second_process_compiles_nothing_and_another_mesh_has_its_own_entries(tmp_path):
    asked, found, tokens, said = start(tmp_path, "data=2")
    place = next(tmp_path.iterdir())
    assert said == f"{place}\n" and place.stat().st_mode & 0o777 == 0o700
    entries = sorted(path.name for path in place.iterdir() if path.name != CHECKED)
    assert asked > 5 and found < asked and len(entries) == asked - found
    assert start(tmp_path, "data=2")[:3] == (asked, asked, tokens)
    assert sorted(path.name for path in place.iterdir() if path.name != CHECKED) == entries
    assert start(tmp_path, "tensor=2")[2] == tokens
    programs = [path.name for path in place.iterdir() if path.name.startswith("jit__generate-")]
    assert len(programs) == 2 and len(list(tmp_path.iterdir())) == 1


ONE_PROGRAM = """
import sys
import jax
from jax import monitoring
from qwen3_jax.compilation import use_compilation_cache

use_compilation_cache(sys.argv[1])
monitoring.register_event_listener(lambda name, **more: print(name) if name.endswith("cache_hits") else None)
jax.jit(lambda x: 2 * x + 1)(jax.numpy.float32(1))
"""


def test_an_entry_that_was_cut_off_is_written_anew(tmp_path):
    """jax itself would compile that program again at every start, for it does not write an entry that is there."""

    def hits():
        done = subprocess.run([sys.executable, "-c", ONE_PROGRAM, str(tmp_path)], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout.count("cache_hits"), done.stderr

    assert hits()[0] == 0
    (entry,) = [path for path in next(tmp_path.iterdir()).glob("*-cache") if "lambda" in path.name]
    whole = entry.read_bytes()
    entry.write_bytes(whole[: len(whole) // 2])
    found, said = hits()
    assert said == f"{entry} was cut off, by a kill or a full disk: removed, and compiled anew where it is wanted\n"
    assert len(entry.read_bytes()) > len(whole) // 2
    assert hits() == (found + 1, "")


@pytest.mark.parametrize("pack", [zlib.compress, zstandard.compress])
def test_entries_are_looked_at_once_and_others_left_alone(tmp_path, plain_config, pack):
    plain_config.update("jax_compilation_cache_dir", str(tmp_path))
    whole = pack(os.urandom(2**21))  # more than is read at once
    kept = {"a-cache": whole, "b-cache": b"of no form that is known", "cut-off": whole[:9], "a-atime": b""}
    cut = {f"{at}-cache": whole[:at] for at in (0, 3, 9, len(whole) - 1)}
    for name, data in (kept | cut).items():
        (tmp_path / name).write_bytes(data)
    assert {path.name for path in mend_compilation_cache()} == set(cut)
    assert {path.name for path in tmp_path.iterdir()} == {*kept, CHECKED}
    # What was written before the last look is not read again.
    (tmp_path / "a-cache").write_bytes(whole[:9])
    os.utime(tmp_path / "a-cache", (1, 1))
    assert mend_compilation_cache() == []


@pytest.fixture
def plain_config():
    """jax's settings as they were."""
    import jax

    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    yield jax.config
    for name, value in before.items():
        jax.config.update(name, value)


def test_the_folder_is_the_user_s_and_one_for_each_set_of_versions(tmp_path, monkeypatch, plain_config):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    place = use_compilation_cache()
    assert place.parent == tmp_path / "cache" / "qwen3-jax" and str(place) == plain_config.jax_compilation_cache_dir
    monkeypatch.setattr("importlib.metadata.version", lambda name: "9" if name == PACKAGES[0] else "1")
    assert use_compilation_cache(tmp_path / "other").name == "jax_9-" + "-".join(f"{name}_1" for name in PACKAGES[1:])
    # What the user has told jax stands.
    plain_config.update("jax_compilation_cache_dir", str(tmp_path / "own"))
    assert use_compilation_cache() == tmp_path / "own" and not (tmp_path / "own").exists()
    plain_config.update("jax_compilation_cache_dir", None)
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert use_compilation_cache().is_relative_to(tmp_path / ".cache" / "qwen3-jax")


def test_a_folder_that_cannot_be_made_is_refused(tmp_path, plain_config):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"compilation cache .*/file/cache/jax_.*: Not a directory: accepted is a folder"):
        use_compilation_cache(tmp_path / "file" / "cache")
    assert plain_config.jax_compilation_cache_dir is None

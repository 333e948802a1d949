"""Which family's template serves a folder that has none: what the folder says it was made from, or what is asked for."""

import json

import pytest

from qwen3_jax.chat.family import TEMPLATES, family_of, family_template
from qwen3_jax.chat.files import TokenizerError


@pytest.mark.parametrize(
    "name, family",
    [
        ("Qwen3-0.6B", "hybrid"),
        ("Qwen3-235B-A22B", "hybrid"),
        ("Qwen3-4B-Instruct-2507", "instruct_2507"),
        ("Qwen3-235B-A22B-Instruct-2507-FP8", "instruct_2507"),
        ("qwen3-30b-a3b-thinking-2507", "thinking_2507"),
        ("Qwen3-Coder-30B-A3B-Instruct", "coder"),
        ("Qwen3-Embedding-0.6B", "embedding"),
        ("checkpoint-1000", "hybrid"),
        ("my-coder-thinking-run", "hybrid"),
    ],
)
def test_a_name_tells_the_family(tmp_path, name, family):
    places = {where: tmp_path / where / "run" for where in ("config", "card", "card_list", "cache")} | {"own": tmp_path / name}
    places["cache"] = tmp_path / f"models--Qwen--{name}" / "snapshots" / "0123abc"
    for place in places.values():
        place.mkdir(parents=True)
    (places["config"] / "config.json").write_text(json.dumps({"_name_or_path": f"Qwen/{name}"}))
    (places["card"] / "README.md").write_text(f"---\nlicense: x\nbase_model: Qwen/{name}\ntags: y\n---\nQwen3-Coder-1B\n")
    (places["card_list"] / "README.md").write_text(f'---\nbase_model:\n- "Qwen/{name}"\n---\n')
    assert {where: family_of(place) for where, place in places.items()} == dict.fromkeys(places, family)


def test_what_it_was_made_from_goes_before_its_name(tmp_path):
    place = tmp_path / "Qwen3-4B-Instruct-2507"
    place.mkdir()
    (place / "README.md").write_text("no front matter\n---\nbase_model: Qwen/Qwen3-Coder-30B-A3B-Instruct\n---\n")
    assert family_of(place) == "instruct_2507"
    (place / "README.md").write_text("---\nbase_model: Qwen/Qwen3-8B\n---\n")
    assert family_of(place) == "hybrid"
    (place / "config.json").write_text('{"_name_or_path": "Qwen/Qwen3-4B-Thinking-2507"}')
    assert family_of(place) == "thinking_2507"
    (place / "config.json").write_text('{"_name_or_path": "/data/run"}')
    assert family_of(place) == "hybrid"
    (place / "config.json").write_text("[]")
    with pytest.raises(TokenizerError, match="config.json holds a JSON list"):
        family_of(place)


def test_an_unknown_family_is_refused(published):
    from qwen3_jax import load_tokenizer

    for name in ("instruct", ""):
        with pytest.raises(
            TokenizerError, match=f"family is '{name}': accepted are hybrid, instruct_2507, thinking_2507, coder"
        ):
            load_tokenizer(published, family=name)


def test_the_thinking_template_is_the_hybrid_one_but_for_its_generation_prompt():
    hybrid, thinking = (family_template(name).split("\n", 1)[1] for name in ("hybrid", "thinking_2507"))
    cut = "{%- if add_generation_prompt %}"
    assert hybrid.partition(cut)[0] == thinking.partition(cut)[0]
    assert TEMPLATES["embedding"] == TEMPLATES["hybrid"]

"""A folder's tokenizer, made in Qwen3's own pipeline: text there and back, special tokens, its own template, bad folders."""

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3_jax import load_tokenizer
from qwen3_jax.chat.template import TemplateError, normal_form
from qwen3_jax.chat.tokenizer import TokenizerError
from tools.demo.corpus import train_tokenizer

SAMPLE = [{"role": "user", "content": "def read(path): return open(path).read()"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer([SAMPLE] * 20, 400, place)
    return place


@settings(max_examples=60, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_text_comes_back_but_for_its_normal_form(folder, text):
    import unicodedata

    tok = load_tokenizer(folder)
    assert tok.decode(tok.encode(text)) == unicodedata.normalize("NFC", text)


def test_special_tokens_are_one_id_and_thoughts_stay_when_they_are_skipped(folder):
    tok = load_tokenizer(folder)
    ids = tok.encode("<|im_start|>assistant\n<think>\nhm\n</think>\n\nyes<|im_end|>")
    assert [ids[0], ids[-1]] == [tok.encode("<|im_start|>")[0], tok.eos_token_id]
    assert tok.decode(ids, skip_special_tokens=True) == "assistant\n<think>\nhm\n</think>\n\nyes"
    assert tok.stop_token_ids == (tok.eos_token_id,)
    assert tok.pad_token_id == tok.encode("<|endoftext|>")[0]


def test_the_family_s_template_serves_a_folder_without_one(folder):
    tok = load_tokenizer(folder)
    text = tok.apply_chat_template(SAMPLE, add_generation_prompt=True, enable_thinking=False, tokenize=False)
    assert text == f"<|im_start|>user\n{SAMPLE[0]['content']}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    assert tok.apply_chat_template(SAMPLE, add_generation_prompt=True, enable_thinking=False) == tok.encode(text)


@pytest.mark.parametrize("where", ["tokenizer_config.json", "named", "chat_template.jinja"])
def test_the_folder_s_own_template_goes_first(folder, tmp_path, where):
    tok = load_tokenizer(folder)
    tok.save(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    own = "{{ eos_token }}{{ messages[0].content }}"
    if where == "chat_template.jinja":
        (tmp_path / where).write_text(own)
    else:
        config = json.loads((tmp_path / "tokenizer_config.json").read_text())
        config["chat_template"] = own if where != "named" else [{"name": "default", "template": own}]
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 5]}')
    again = load_tokenizer(tmp_path)
    assert again.apply_chat_template(SAMPLE, tokenize=False) == f"<|im_end|>{SAMPLE[0]['content']}"
    assert again.stop_token_ids == (7, 5)


def named(place, tok, *, files=None, listed=None):
    """A copy of a tokenizer whose templates have names."""
    tok.save(place)
    (place / "chat_template.jinja").unlink()
    if listed is not None:
        config = json.loads((place / "tokenizer_config.json").read_text())
        config["chat_template"] = [{"name": name, "template": name} for name in listed]
        (place / "tokenizer_config.json").write_text(json.dumps(config))
    for name in files or ():
        file = place / ("chat_template.jinja" if name == "default" else f"additional_chat_templates/{name}.jinja")
        file.parent.mkdir(exist_ok=True)
        file.write_text(name)
    return load_tokenizer(place)


@pytest.mark.parametrize("form", ["files", "listed"])
def test_templates_with_names_are_chosen_as_transformers_does(folder, tmp_path, form):
    tok = named(tmp_path, load_tokenizer(folder), **{form: ["default", "tool_use", "rag"]})
    (tmp_path / "again").mkdir()
    tok.save(tmp_path / "again")
    for each in (tok, load_tokenizer(tmp_path / "again")):
        assert each.apply_chat_template(SAMPLE, tokenize=False) == "default"
        assert each.apply_chat_template(SAMPLE, tools=[], tokenize=False) == "tool_use"
        assert each.template == {name: name for name in ("default", "tool_use", "rag")}


@pytest.mark.parametrize("form", ["files", "listed"])
def test_without_a_default_template_the_names_are_told(folder, tmp_path, form):
    tok = named(tmp_path, load_tokenizer(folder), **{form: ["tool_use", "rag"]})
    assert tok.apply_chat_template(SAMPLE, tools=[{"name": "f"}], tokenize=False) == "tool_use"
    with pytest.raises(TokenizerError, match="its chat templates are rag, tool_use: accepted is one named default"):
        tok.apply_chat_template(SAMPLE)
    assert isinstance(tok.template, dict)
    tok.template = tok.template["rag"]
    assert tok.apply_chat_template(SAMPLE, tokenize=False) == "rag"


def test_files_of_templates_go_before_those_of_the_config(folder, tmp_path):
    tok = named(tmp_path, load_tokenizer(folder), files=["rag"], listed=["default"])
    assert tok.template == {"rag": "rag"}


@pytest.mark.parametrize("given", [5, [5], [{"name": "default"}], [{"template": "a"}], {"default": 5}])
def test_templates_that_are_none_are_refused_by_file(folder, tmp_path, given):
    load_tokenizer(folder).save(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": given}))
    with pytest.raises(TokenizerError, match="tokenizer_config.json: chat_template: accepted is text, or a list of objects"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "field, value, accepted",
    [
        ("eos_token_id", "x", "an id or a list of ids"),
        ("eos_token_id", [1, "x"], "an id or a list of ids"),
        ("eos_token_id", -1, "an id or a list of ids"),
        ("eos_token_id", True, "an id or a list of ids"),
        ("temperature", "hot", "a number"),
        ("top_p", [0.5], "a number"),
        ("top_k", 2.5, "an integer"),
        ("do_sample", "yes", "true or false"),
    ],
)
def test_generation_settings_of_another_type_are_refused_by_file_and_field(folder, tmp_path, field, value, accepted):
    load_tokenizer(folder).save(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({field: value}))
    says = f"generation_config.json: {field} is {value!r}: accepted is {accepted}"
    with pytest.raises(TokenizerError, match=re.escape(says)):
        load_tokenizer(tmp_path).stop_token_ids  # noqa: B018
    (tmp_path / "generation_config.json").write_text(json.dumps({field: None, "other": "x"}))
    assert load_tokenizer(tmp_path).generation_config["other"] == "x"


@pytest.mark.parametrize("text", ["a\udcff", "\ud83d"])
def test_half_a_surrogate_pair_is_no_text(folder, text):
    tok = load_tokenizer(folder)
    with pytest.raises(TokenizerError, match=re.escape(f"the text has {text[-1]!r} at {len(text) - 1}: accepted is Unicode")):
        tok.encode(text)
    with pytest.raises(TokenizerError, match="accepted is Unicode without surrogates"):
        tok.apply_chat_template([{"role": "user", "content": text}])


def test_broken_folders_are_refused_by_path(folder, tmp_path):
    with pytest.raises(TokenizerError, match="tokenizer.json is not there"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(TokenizerError, match="tokenizer.json is no tokenizer"):
        load_tokenizer(tmp_path)
    load_tokenizer(folder).save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[1]")
    with pytest.raises(TokenizerError, match="tokenizer_config.json holds a JSON list"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(TokenizerError, match="chat_template.jinja is no UTF-8 text"):
        load_tokenizer(tmp_path)


def test_saved_again_a_folder_keeps_its_family_s_template(folder, tmp_path):
    tok = load_tokenizer(folder, family="thinking_2507")
    tok.save(tmp_path)
    again = load_tokenizer(tmp_path, family="coder")  # the folder's own template goes before the family asked for
    assert again.template == tok.template
    again.save(tmp_path)  # onto itself
    assert (
        load_tokenizer(tmp_path).apply_chat_template(SAMPLE, add_generation_prompt=True, tokenize=False).endswith("<think>\n")
    )


def test_a_template_s_text_is_the_whole_text(folder, tmp_path):
    """Embedding folders end an encoded text with an end of text, by their tokenizer.json; a rendered conversation has none."""
    load_tokenizer(folder).save(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text("utf-8"))
    end = load_tokenizer(folder).pad_token_id
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [end], "tokens": ["<|endoftext|>"]}},
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), "utf-8")
    tok = load_tokenizer(tmp_path)
    assert tok.encode("ab")[-1] == end
    assert tok.apply_chat_template(SAMPLE) == load_tokenizer(folder).apply_chat_template(SAMPLE)
    assert end not in tok.thinking_budget(1).early_stop_ids


def test_a_budget_needs_the_token_that_ends_a_thought(folder, tmp_path):
    load_tokenizer(folder).save(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text("utf-8"))
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] != "</think>"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), "utf-8")
    with pytest.raises(TokenizerError, match="the vocabulary has no token </think>"):
        load_tokenizer(tmp_path).thinking_budget(5)


def test_messages_that_are_none_are_refused(folder):
    tok = load_tokenizer(folder)
    with pytest.raises(TokenizerError, match="messages is empty"):
        tok.apply_chat_template([])
    with pytest.raises(TemplateError, match="messages\\[1\\] is list"):
        normal_form([{"role": "user", "content": "a"}, []])

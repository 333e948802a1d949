"""Rendering equals transformers' byte for byte, and what goes wrong in a template is one clear error."""

import dataclasses
import json
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest

from qwen3_jax.chat.family import TEMPLATES, family_template
from qwen3_jax.chat.template import TemplateError, normal_form, render

HYBRID = family_template("hybrid")


def fixture(name):
    return json.loads((Path(__file__).parents[1] / "fixtures" / "chat" / f"{name}.json").read_text("utf-8"))


FIXTURE = fixture("hybrid")


def test_two_hundred_conversations_render_as_transformers_does():
    assert len(FIXTURE["cases"]) == 200
    for case in FIXTURE["cases"]:
        assert render(HYBRID, {"messages": case["messages"], **case["options"]}) == case["text"]


@pytest.mark.parametrize("family", ["hybrid", "instruct_2507", "thinking_2507", "coder"])
@pytest.mark.parametrize("name, cases, refused", [("families", 40, 3), ("normal_forms", 6, 0)])
def test_every_family_renders_as_transformers_does(family, name, cases, refused):
    source = family_template(family)
    found = fixture(name)["cases"]
    refusals = 0
    for case in found:
        values = {"messages": normal_form(case["messages"]), "tools": None, **case["options"]}
        want = case["texts"][family]
        if want is None:  # transformers raises: a content or an argument that the template takes as text, and is none
            refusals += 1
            with pytest.raises(TemplateError):
                render(source, values)
        else:
            assert render(source, values) == want
    assert len(found) == cases and refusals >= refused


def test_messages_reach_a_template_in_transformers_normal_form():
    source = "{% for message in messages %}{{ message | tojson }}{{ documents is none }}{% endfor %}"
    for case in fixture("normal_forms")["cases"]:
        before = json.dumps(case["messages"])
        assert render(source, {"messages": normal_form(case["messages"]), "documents": None}) == case["texts"]["whole"]
        assert json.dumps(case["messages"]) == before


def test_the_families_generation_prompts():
    values = {"messages": [{"role": "user", "content": "a"}], "add_generation_prompt": True}
    ends = {family: render(family_template(family), values).partition("<|im_start|>assistant\n")[2] for family in TEMPLATES}
    assert ends == {"hybrid": "", "instruct_2507": "", "thinking_2507": "<think>\n", "coder": "", "embedding": ""}
    # The 2507 and Coder models do not switch.
    for family in ("instruct_2507", "thinking_2507", "coder"):
        for thinking in (True, False):
            assert render(family_template(family), values | {"enable_thinking": thinking}) == render(
                family_template(family), values
            )


@pytest.mark.parametrize(
    "thinking, ends",
    [({}, "assistant\n"), ({"enable_thinking": True}, "assistant\n"), ({"enable_thinking": False}, "<think>\n\n</think>\n\n")],
)
def test_generation_prompt_by_mode(thinking, ends):
    text = render(HYBRID, {"messages": [{"role": "user", "content": "a"}], "add_generation_prompt": True, **thinking})
    assert text.endswith(ends)


def test_what_transformers_adds_to_jinja():
    assert render("{{ x | tojson }}", {"x": {"b": "<é>", "a": 1}}) == '{"b": "<é>", "a": 1}'
    assert render("a{% generation %}b{{ x }}{% endgeneration %}c", {"x": 1}) == "ab1c"
    assert render("{% for i in range(9) %}{% if i == 3 %}{% break %}{% endif %}{{ i }}{% endfor %}", {}) == "012"
    assert render("{{ strftime_now('%Y') }}", {}).isdigit()
    with pytest.raises(TemplateError, match="only users"):
        render("{{ raise_exception('only users') }}", {})


# transformers renders these too; the texts are what it gives (5.23, jinja2 3.1.6).
@pytest.mark.parametrize(
    "source, text",
    [
        ("{{ '%s-%03d' % ('a', 7) }}", "a-007"),
        ("{{ '{}:{:>3}'.format(messages[0].role, 1) }}", "user:  1"),
        ("{{ 'a\nb' | indent(2) }}", "a\n  b"),
        ("{{ 'a b c' | wordcount }}", "3"),
        ("{{ 'a' | center(5) }}|{{ 'a'.ljust(3) }}|", "  a  |a  |"),
        ("{{ '%s/%s' | format('a', 'b') }}", "a/b"),
        ("{% for role, said in messages | groupby('role') %}{{ role }}{{ said | length }}{% endfor %}", "assistant1user1"),
        ("{% for row in [1, 2, 3] | batch(2) %}{{ row }}{% endfor %}", "[1, 2][3]"),
        ("{{ 2 ** 3 }}{{ dict(a=1) }}{{ dict.fromkeys([1]) }}", "8{'a': 1}{1: None}"),
        ("{{ (messages | tojson(indent=1)).split('\n') | length }}", "10"),
    ],
)
def test_what_transformers_renders_is_not_refused(source, text):
    assert render(source, {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}) == text


def test_values_of_other_types_reach_a_template_as_json_has_them():
    @dataclasses.dataclass
    class Call:
        name: str
        weight: Any

    class Text(str):
        pass

    values = {
        "x": [MappingProxyType({"a": Text("b")}), (np.int64(3), np.bool_(False)), Call("f", np.zeros(2)), True, 1.5, None]
    }
    shown = "[{'a': 'b'}, (3, False), {'name': 'f', 'weight': '<ndarray>'}, True, 1.5, None]"
    assert render("{{ x }}", values) == shown


@pytest.mark.parametrize(
    "source, says",
    [
        ("{{ 'a'.index('z') }}", "the chat template failed: ValueError: substring not found"),
        ("{{ none + 1 }}", "the chat template failed: TypeError: "),
        ("{{ 1 // 0 }}", "the chat template failed: ZeroDivisionError: "),
        ("{{ 'é'.encode('ascii') }}", "the chat template failed: UnicodeEncodeError: "),
        ("{{ 'a'.encode('nowhere') }}", "the chat template failed: LookupError: unknown encoding: nowhere"),
        ("{{ 1e308 * 10 ** 400 }}", "the chat template failed: OverflowError: "),
        ("{{ range(10 ** 9) }}", "the chat template failed: OverflowError: Range too big"),
        ("{{ 'a' * 10 ** 10 }}", "the chat template needs more than 512 MiB of memory"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "the chat template failed: RecursionError: "),
        ("{{ nowhere() }}", "the chat template failed: 'nowhere' is undefined"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "the chat template failed: "),
        ("{% for", "the chat template is no jinja2: "),
        ("{{ raise_exception('only users') }}", "the chat template failed: only users"),
        ("{{ raise_exception('a' * 1000000) }}", "the chat template failed: aaaa"),
        ("x" * 1_000_001, "the chat template failed: it has 1,000,001 characters; accepted are 1,000,000"),
    ],
)
def test_what_goes_wrong_in_a_template_is_one_error_that_says_so(source, says):
    with pytest.raises(TemplateError) as caught:
        render(source, {})
    assert str(caught.value).startswith(says) and len(str(caught.value)) < 2100


def test_what_goes_wrong_in_a_family_s_template_is_the_same_error():
    nested: list = []
    for _ in range(5000):
        nested = [nested]
    for arguments in (nested, {1, 2}):
        call = {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": arguments}, 5]}
        with pytest.raises(TemplateError, match="the chat template failed: "):
            render(HYBRID, {"messages": [{"role": "user", "content": "a"}, call]})

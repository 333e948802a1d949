"""Rendering equals transformers' byte for byte, and a hostile template is stopped."""

import json
import time
from pathlib import Path

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


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}{% endfor %}",
        "{{ range(10 ** 9) }}",
        "{{ range(1000000000) | list }}",
        "{{ 'a' * 10000000000 }}",
        "{{ [0] * 10000000000 }}",
        "{{ 9 ** 9 ** 9 }}",
        "{% set ns = namespace(x='aaaaaaaa') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        "{% set ns = namespace(x='aaaaaaaa') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
        "{% set ns = namespace(x='aaaaaaaa') %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] | join %}{% endfor %}",
        "{% set ns = namespace(x='aaaaaaaa') %}{% for i in range(60) %}{% set ns.x = ns.x.join([ns.x, ns.x]) %}{% endfor %}",
        "{% set ns = namespace(x='aaaaaaaa') %}{% for i in range(60) %}{% set ns.x = ns.x.replace('a', ns.x) %}{% endfor %}",
        "{% set ns = namespace(x='aaaaaaaa') %}{% for i in range(60) %}{% set ns.x = ns.x | replace('a', ns.x) %}{% endfor %}",
        "{% set ns = namespace(x=3) %}{% for i in range(60) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
        "{{ 'a'.center(10000000000) }}",
        "{{ 'a' | center(10000000000) }}",
        "{{ '%9999999999d' % 1 }}",
        "{{ '{:9999999999}'.format(1) }}",
        "{{ '{0.__class__}'.format(messages) }}",
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ raise_exception.__globals__.json }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{% include 'x' %}",
        "{{ lipsum(n=100000) }}",
        "{{ messages.append(1) }}",
        "{{ ('a' * 9000000) | list }}",
        "{{ ('a b ' * 2000000).split() }}",
        "{{ ('a' * 9000000) | sort }}",
        "{% for",
    ],
)
def test_a_hostile_template_is_stopped_soon(source):
    begin = time.monotonic()
    with pytest.raises(TemplateError):
        render(source, {"messages": [{"role": "user", "content": "a"}]})
    # Ten times what the slowest takes here; an unbounded one would never come back.
    assert time.monotonic() - begin < 20
    assert render("{{ 1 + 1 }}", {}) == "2"

"""Rendering equals transformers' byte for byte, and a hostile template is stopped."""

import json
import time
from pathlib import Path

import pytest

import qwen3_jax.chat.template as home
from qwen3_jax.chat.template import TemplateError, render

HYBRID = (Path(home.__file__).parent / "templates" / "hybrid.jinja").read_text("utf-8")
FIXTURE = json.loads((Path(__file__).parents[1] / "fixtures" / "chat" / "hybrid.json").read_text("utf-8"))


def test_two_hundred_conversations_render_as_transformers_does():
    assert len(FIXTURE["cases"]) == 200
    for case in FIXTURE["cases"]:
        assert render(HYBRID, {"messages": case["messages"], **case["options"]}) == case["text"]


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

"""A folder's own template is somebody else's program: it can't run on, fill the memory, run code, or disturb its neighbours."""

import multiprocessing
import os
import resource
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import jax.numpy as jnp
import pytest

from qwen3_jax.chat import renderer
from qwen3_jax.chat.family import family_template
from qwen3_jax.chat.template import TemplateError, render

# An own template: the family's, in other words.
OWN = family_template("hybrid") + "{#- own -#}"


def repeated(step, times=60, start="x='aaaaaaaa'"):
    return f"{{% set ns = namespace({start}) %}}{{% for i in range({times}) %}}{step}{{% endfor %}}"


NESTED = repeated("{% set ns.x = [ns.x, ns.x] %}", 40, "x=[1]")

ATTACKS = [
    # Loops.
    "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}{% endfor %}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{% macro f(n) %}{% for i in [1, 2] %}{% if n %}{{ f(n-1) }}{% endif %}{% endfor %}{% endmacro %}{{ f(60) }}",
    "{% for a in messages recursive %}{{ loop(messages) }}{% endfor %}",
    "{{ range(10 ** 9) }}",
    "{{ range(1000000000) | list }}",
    "{{ lipsum(n=100000) }}",
    # Texts that double.
    repeated("{% set ns.x = ns.x ~ ns.x %}"),
    repeated("{% set ns.x = ns.x + ns.x %}"),
    repeated("{% set ns.x = [ns.x, ns.x] | join %}"),
    repeated("{% set ns.x = ns.x.join([ns.x, ns.x]) %}"),
    repeated("{% set ns.x = ns.x.replace('a', ns.x) %}"),
    repeated("{% set ns.x = ns.x | replace('a', ns.x) %}"),
    repeated("{% set ns.x %}{{ ns.x }}{{ ns.x }}{% endset %}"),
    "{% macro d(s) %}{{ s }}{{ s }}{% endmacro %}" + repeated("{% set ns.x = d(ns.x) %}"),
    repeated("{% set ns.x = '%s%s' % (ns.x, ns.x) %}"),
    repeated("{% set ns.x = '{0}{0}'.format(ns.x) %}"),
    # One call that makes something huge.
    "{{ 'a' * 10000000000 }}",
    "{{ [0] * 10000000000 }}",
    "{{ (1, 2, 3) * 20000000 }}",
    "{{ 9 ** (9 ** 9) }}",
    repeated("{% set ns.x = ns.x * ns.x %}", start="x=3"),
    "{{ 'a'.center(10000000000) }}",
    "{{ 'a' | center(10000000000) }}",
    "{{ 'a\na' | indent(10000000000) }}",
    "{{ '%9999999999d' % 1 }}",
    "{{ '%9999999999s' | format(1) }}",
    "{{ '{:9999999999}'.format(1) }}",
    "{{ ['{:>9999999999}'] | map('format', 1) | list }}",
    "{{ messages | tojson(indent=1000000000) }}",
    "{{ (1).to_bytes(4000000000, 'big') | length }}",
    "{{ 'a'.encode().ljust(3000000000) | length }}",
    "{{ ('aaaa'.encode() * 3000000000) | length }}",
    "{{ ('a' * 9000000) | list }}",
    "{{ ('a b ' * 20000000).split() }}",
    "{{ ('a' * 9000000) | sort }}",
    # Slices and searches that are long each time.
    "{% set a = 'a' * 16000000 %}{% set ns = namespace(l=[]) %}"
    "{% for i in range(9000) %}{% set ns.l = ns.l + [a[1:]] %}{% endfor %}",
    "{% set a = 'a' * 16000000 %}{% for i in range(90000) %}{% set b = a[::-1] %}{% endfor %}",
    "{% set a = 'a' * 16000000 %}{% for i in range(90000) %}{% if 'b' in a %}x{% endif %}{% endfor %}",
    "{% set a = range(100000) %}{% for i in range(90000) %}{% set z = 3.5 in a %}{% endfor %}",
    # Containers that are small only while nobody writes them out.
    NESTED + "{{ ns.x }}",
    NESTED + "{{ ns.x | tojson }}",
    NESTED + "{{ ns.x | string }}",
    NESTED + "{{ ns.x ~ 'a' }}",
    NESTED + "{{ raise_exception(ns.x) }}",
    NESTED.replace("x=[1]", "x=[1], y=[1]").replace("{% endfor", "{% set ns.y = [ns.y, ns.y] %}{% endfor")
    + "{{ ns.x == ns.y }}",
    "{% set x = [0] * 1000000 %}{% set x = [x] * 1000 %}{{ x | sum(start=[]) | length }}",
    # The compiler.
    "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "{% if 1 %}" * 3000,
    "{% for",
    # Python's objects.
    "{{ messages.__class__.__mro__ }}",
    "{{ ''.__class__.__base__.__subclasses__() }}",
    "{{ raise_exception.__globals__.json }}",
    "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
    "{{ namespace(__init__=1) }}",
    "{{ messages.append(1) }}",
    "{% include 'x' %}",
]


def largest_process():
    """Kilobytes of the largest process that this one started and that has ended."""
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss


def inherited() -> int:
    """Kilobytes that any child counts at least: it begins as this process, as large as that has been, and touches some more."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss + 2_000


@pytest.mark.parametrize("source", ATTACKS, ids=range(len(ATTACKS)))
def test_a_hostile_template_is_stopped_soon(source):
    begin, before = time.monotonic(), largest_process()
    with pytest.raises(TemplateError, match="the chat template "):
        render(source, {"messages": [{"role": "user", "content": "a"}]})
    # Two seconds of processor time, or five times that on the clock where others are at work.
    assert time.monotonic() - begin < 15
    assert largest_process() <= max(before, inherited(), 600_000)
    assert render("{{ 1 + 1 }}", {}) == "2"


CONVERSATIONS = {
    "a thought of 100,000 tokens": [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "<think>\n" + "word " * 100_000 + "\n</think>\n\nyes"},
        {"role": "user", "content": "next"},
    ],
    "fifty turns of 1,500 tokens": [
        message
        for _ in range(50)
        for message in (
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": "<think>\n" + "word " * 1500 + "\n</think>\n\nyes"},
        )
    ],
    "arguments of 8,000,000 characters": [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "", "tool_calls": [{"name": "write", "arguments": {"text": "wörd\n" * 1_600_000}}]},
        {"role": "tool", "content": "done"},
    ],
    "twenty thousand short turns": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * 10_000,
}


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_what_a_template_may_take_grows_with_the_conversation(name):
    values = {"messages": CONVERSATIONS[name], "add_generation_prompt": True}
    text = render(OWN, values)
    assert text == render(family_template("hybrid"), values)


def test_own_templates_render_on_many_threads_while_jax_runs():
    def work(number):
        source = OWN if number % 2 else "{{ messages[0].content }}{{ 0 }}"
        return [render(source, {"messages": [{"role": "user", "content": f"{number}-{turn}"}]}) for turn in range(20)]

    total = jnp.ones((64, 64))
    with ThreadPoolExecutor(8) as threads:
        found = threads.map(work, range(8))
        for _ in range(50):
            total = total @ jnp.eye(64)
        for number, texts in enumerate(found):
            assert all(f"{number}-{turn}" in text for turn, text in enumerate(texts))
    assert float(total.sum()) == 64 * 64
    assert len(renderer._POOL._idle) <= 4


def test_one_process_serves_a_template_and_only_one_that_is_not_known_gets_any(monkeypatch):
    monkeypatch.setattr(renderer, "_POOL", renderer._Pool())
    for family in ("hybrid", "coder"):
        render(family_template(family), {"messages": [{"role": "user", "content": "a"}]})
    assert not renderer._POOL._idle
    for number in range(3):
        assert render("one {{ x }}", {"x": number}) == f"one {number}"
    (process,) = renderer._POOL._idle
    with pytest.raises(TemplateError):
        render("two {{ raise_exception(x) }}", {"x": "no"})
    assert renderer._POOL._idle == [process]
    # One that somebody else ended is replaced.
    os.kill(process._process.pid, signal.SIGKILL)
    process._process.wait()
    assert render("one {{ x }}", {"x": 5}) == "one 5"
    process.end()
    renderer._POOL.end()


def test_the_bounds_of_a_short_conversation_are_not_the_next_one_s(monkeypatch):
    monkeypatch.setattr(renderer, "MEMORY", 80 << 20)
    # More than a short conversation may fill, which the same process has rendered before.
    for length in (1, 60_000_000, 1):
        assert render("short {{ x | length }}", {"x": "a" * length}) == f"short {length}"


def test_an_interrupt_ends_a_rendering_and_leaves_nothing_behind(interruptible):
    main = threading.main_thread().ident
    assert main is not None

    def interrupt():
        time.sleep(0.5)
        signal.pthread_kill(main, signal.SIGINT)  # a signal that another thread takes would not end the main one's wait

    thread = threading.Thread(target=interrupt)
    thread.start()
    source = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(KeyboardInterrupt):
        render(source, {})
    thread.join()
    assert not any(process.source == source for process in renderer._POOL._idle)


def _render_after_fork(queue):
    queue.put(render("own {{ x }}", {"x": 2}))


@pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning", "ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_forked_process_gets_renderers_of_its_own():
    assert render("own {{ x }}", {"x": 1}) == "own 1"
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=_render_after_fork, args=(queue,))
    process.start()
    assert queue.get(timeout=60) == "own 2"
    process.join(60)
    assert process.exitcode == 0
    assert render("own {{ x }}", {"x": 3}) == "own 3"

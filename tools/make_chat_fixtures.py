"""Write tests/fixtures/chat/{hybrid,families,normal_forms}.json: what transformers makes of the published templates.

Runs in an environment with transformers, which the package itself never needs. The fixtures were written with 5.23 and
compared with 4.57:

    python tools/make_chat_fixtures.py FOLDER TEMPLATES            write
    python tools/make_chat_fixtures.py FOLDER TEMPLATES --check    compare with what is written

FOLDER has Qwen3's tokenizer.json and tokenizer_config.json. TEMPLATES has the two published templates that are pinned below,
as instruct_2507.jinja (also in TRL, trl/chat_templates/qwen3_instruct_2507.jinja) and coder.jinja (also in vLLM,
examples/tool_chat_template_qwen3coder.jinja). Thinking-2507's is the hybrid one with another generation prompt.
"""

import argparse
import hashlib
import json
import random
from pathlib import Path

import jinja2
import transformers

ROOT = Path(__file__).resolve().parents[1]
WORDS = ["hello", "naïve café", "<b>&'\"", "", "\n\n", " spaced ", "日本語", "12345", "{{ x }}", "tab\there", "😀"]
THOUGHTS = [None, "", "short", "\nlong\n\nthought\n", "</think>"]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "What's the weather <now> & later?",
            "parameters": {"type": "object", "properties": {"ort": {"type": "string", "enum": ["Zürich", "ソウル"]}}},
        },
    },
    {"type": "function", "function": {"name": "b", "parameters": {}, "a_last": 1}},
]
ARGUMENTS = [
    {},
    {"path": "a b", "n": 3},
    {"flag": True, "none": None, "list": [1, "é"], "map": {"x": {"y": "<z>"}}, "text": "a\nb"},
]
MORE_TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "search",
            "description": "  spaces around\n",
            "strict": True,
            "parameters": {
                "type": "object",
                "properties": {
                    "query": {"type": "string", "description": " what ", "default": None, "minLength": 1},
                    "kinds": {"type": ["array", "null"], "items": {"type": "string"}, "uniqueItems": False},
                    "bare": {},
                },
                "required": ["query"],
                "additionalProperties": False,
            },
        },
    },
    {"name": "flat", "description": None, "parameters": {"properties": {"x": {"type": "integer"}}}},
    {"type": "function", "function": {"name": "nothing"}},
]
# sha256 of the published templates that come in files of their own.
PINNED = {
    "instruct_2507": "64f85b198065d0fba2a81f37e10ed68161ce2c19a754c7100e67e0ca2ee9c326",
    "coder": "5a38bfa05833266240066aedc497decc9b00cc0d3e3b8cceea98cf530196ab06",
}


def text(draw):
    """Some words."""
    return " ".join(draw.choices(WORDS, k=draw.randrange(1, 4)))


def assistant(draw):
    """An assistant's message of one of six kinds."""
    message = {"role": "assistant", "content": text(draw)}
    kind = draw.randrange(6)
    if kind == 0:
        message["content"] = f"<think>\n{text(draw)}\n</think>\n\n{text(draw)}"
    elif kind == 1:
        message["reasoning_content"] = draw.choice(THOUGHTS)
    elif kind == 2:
        message["content"] = f"{text(draw)}</think>{text(draw)}"
    elif kind == 3:
        message["content"] = draw.choice(["", None])
    if draw.random() < 0.4:
        arguments = [{"ort": "Zürich", "n": [1, {"x": None}]}, '{"a": 1}', {}]
        calls = [{"name": "weather", "arguments": draw.choice(arguments)} for _ in range(draw.randrange(1, 3))]
        message["tool_calls"] = [draw.choice([call, {"type": "function", "function": call}]) for call in calls]
    return message


def conversation(draw):
    """Messages of several turns, tools among them."""
    messages = []
    if draw.random() < 0.4:
        messages.append({"role": "system", "content": text(draw)})
    for _ in range(draw.randrange(1, 4)):
        user = {"role": "user", "content": text(draw)}
        if draw.random() < 0.1:
            user["content"] = "<tool_response>\nx\n</tool_response>"
        if draw.random() < 0.1:
            user["content"] = [{"type": "text", "text": "part"}]
        messages.append(user)
        for _ in range(draw.randrange(0, 3)):
            messages.append(assistant(draw))
            messages += [{"role": "tool", "content": text(draw)} for _ in range(draw.randrange(0, 3))]
        if draw.random() < 0.1:
            messages.append({"role": "system", "content": text(draw)})
    options = {"add_generation_prompt": draw.random() < 0.6}
    if draw.random() < 0.6:
        options["enable_thinking"] = draw.random() < 0.5
    if draw.random() < 0.3:
        options["tools"] = draw.sample(TOOLS, draw.randrange(1, 3))
    return messages, options


def spoil(draw, messages):
    """Now and then a content or an argument that some template refuses: the refusal is part of the fixture."""
    kind = draw.randrange(12)
    if kind == 0:
        messages[0] = {"role": "system", "content": [{"type": "text", "text": "part"}]}
    elif kind == 1:
        messages.insert(0, {"role": "tool", "content": text(draw)})
    elif kind == 2:
        messages.append({"role": "tool", "content": draw.choice([{"a": 1}, 7])})
    for message in messages:
        # Text as arguments is refused by the Coder's template; most calls have objects, so that it renders most of them.
        for call in message.get("tool_calls", []):
            inner = call.get("function", call)
            if isinstance(inner["arguments"], str) and draw.random() < 0.7:
                inner["arguments"] = draw.choice(ARGUMENTS)
        if message["role"] == "user" and not isinstance(message["content"], str) and draw.random() < 0.7:
            message["content"] = text(draw)


def render(tokenizer, messages, options, **template):
    """The text; None where transformers refuses."""
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **options, **template)
    except (TypeError, jinja2.TemplateError):
        return None


def hybrid(tokenizer):
    """200 conversations, 60 of them with ids, and 40 plain texts."""
    draw, cases = random.Random(0), []
    while len(cases) < 200:
        messages, options = conversation(draw)
        rendered = tokenizer.apply_chat_template(messages, tokenize=False, **options)
        ids = tokenizer(rendered)["input_ids"] if len(cases) < 60 else None
        cases.append({"messages": messages, "options": options, "text": rendered, "ids": ids})
    texts = ["".join(draw.choices(WORDS + list("aé \n9'’"), k=12)) for _ in range(40)]
    return {"cases": cases, "plain": [{"text": value, "ids": tokenizer(value)["input_ids"]} for value in texts]}


def families(tokenizer, templates):
    """40 conversations, each by every family's template."""
    draw, cases = random.Random(1), []
    while len(cases) < 40:
        messages, options = conversation(draw)
        if draw.random() < 0.5:
            options["tools"] = draw.sample(TOOLS + MORE_TOOLS, draw.randrange(1, 4))
        spoil(draw, messages)
        texts = {name: render(tokenizer, messages, options, chat_template=source) for name, source in templates.items()}
        cases.append({"messages": messages, "options": options, "texts": texts})
    return {"cases": cases}


def normal_forms(tokenizer, templates):
    """What transformers does to messages before the template sees them, from version 5 on: no nulls, one name of reasoning."""
    user, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    conversations = [
        [{"role": "system", "content": None}, user],
        [user, {"role": "assistant", "content": None, "tool_calls": None}, {"role": "tool", "content": None}],
        [user, answer | {"reasoning": "r"}],
        [user, answer | {"thinking": "t", "reasoning": "r"}],
        [user, answer | {"thinking": "t", "reasoning_content": ""}],
        [user, answer | {"reasoning_content": None, "reasoning": "r"}],
    ]
    sources = {**templates, "whole": "{% for message in messages %}{{ message | tojson }}{{ documents is none }}{% endfor %}"}
    return {
        "cases": [
            {
                "messages": messages,
                "options": {},
                "texts": {name: render(tokenizer, messages, {}, chat_template=source) for name, source in sources.items()},
            }
            for messages in conversations
        ]
    }


def published(tokenizer, folder):
    """Each family's published template."""
    sources = {"hybrid": tokenizer.chat_template}
    before, _ = tokenizer.chat_template.split("{%- if add_generation_prompt %}")
    prompt = "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n<think>\\n' }}{%- endif %}"
    sources["thinking_2507"] = before + prompt
    for name, digest in PINNED.items():
        content = (folder / f"{name}.jinja").read_bytes()
        found = hashlib.sha256(content).hexdigest()
        if found != digest:
            raise SystemExit(f"{folder / name}.jinja has sha256 {found}: accepted is {digest}")
        sources[name] = content.decode()
    return sources


def main():
    """Write or compare the fixtures."""
    parser = argparse.ArgumentParser(description="Chat fixtures by transformers.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("templates", type=Path)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.folder)
    templates = published(tokenizer, options.templates)
    contents = {"hybrid": hybrid(tokenizer), "families": families(tokenizer, templates)}
    if int(transformers.__version__.split(".")[0]) >= 5:
        contents["normal_forms"] = normal_forms(tokenizer, templates)
    place = ROOT / "tests" / "fixtures" / "chat"
    place.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        file, written = place / f"{name}.json", json.dumps(content, ensure_ascii=False, indent=0) + "\n"
        if not options.check:
            file.write_text(written, "utf-8")
        elif file.read_text("utf-8") != written:
            raise SystemExit(f"{file}: transformers {transformers.__version__} renders otherwise")
        print(f"{file.name}: {len(content['cases'])} conversations, transformers {transformers.__version__}")


if __name__ == "__main__":
    main()

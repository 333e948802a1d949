"""Write tests/fixtures/chat/hybrid.json: conversations as transformers renders them by the published template.

Runs in an environment with transformers 5.23, which the package itself never needs:

    python tools/make_chat_fixtures.py FOLDER      a folder with Qwen3's tokenizer.json and tokenizer_config.json
"""

import json
import random
import sys
from pathlib import Path

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


def main():
    """Write the fixture."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(sys.argv[1])
    draw, cases = random.Random(0), []
    while len(cases) < 200:
        messages, options = conversation(draw)
        rendered = tokenizer.apply_chat_template(messages, tokenize=False, **options)
        ids = tokenizer(rendered)["input_ids"] if len(cases) < 60 else None
        cases.append({"messages": messages, "options": options, "text": rendered, "ids": ids})
    texts = ["".join(draw.choices(WORDS + list("aé \n9'’"), k=12)) for _ in range(40)]
    plain = [{"text": value, "ids": tokenizer(value)["input_ids"]} for value in texts]
    folder = ROOT / "tests" / "fixtures" / "chat"
    folder.mkdir(parents=True, exist_ok=True)
    content = {"cases": cases, "plain": plain}
    (folder / "hybrid.json").write_text(json.dumps(content, ensure_ascii=False, indent=0) + "\n", "utf-8")
    print(len(cases), "conversations")


if __name__ == "__main__":
    main()

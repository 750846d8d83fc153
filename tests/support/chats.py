"""Chat templates of many families, and conversations of every kind for them."""

import json
import os
import random
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from qdora.template_variables import with_defaults
from tests.support import ROOT
from tests.support.models import make_tokenizer

GOLDEN = Path(__file__).parent.parent / "golden"
TEMPLATES = {file.stem: file.read_text(encoding="utf-8") for file in sorted((GOLDEN / "templates").glob("*.jinja"))}
"""Written for these tests, after the formats that the families publish; `qdora` has none of its own but the default."""
_SMOLLM2 = ROOT / "models" / "SmolLM2-135M-Instruct" / "chat_template.jinja"
if _SMOLLM2.exists():  # launch/setup.sh makes it
    TEMPLATES["smollm2"] = _SMOLLM2.read_text(encoding="utf-8")
TEMPLATES["qwen3_thinking_off"] = with_defaults(TEMPLATES["qwen3"], {"enable_thinking": False})
GIVEN = {
    file.stem: file.read_text(encoding="utf-8")
    for file in (sorted(Path(os.environ["QDORA_TEMPLATES"]).glob("*.jinja")) if "QDORA_TEMPLATES" in os.environ else ())
}
"""Others, of a folder that is named for a run of the tests: the families' own, say."""
_SPECIAL = re.compile(
    r"<\|[a-z_A-Z]+\|>|<\uff5c[^\uff5c]+\uff5c>|<(?:start|end)_of_turn>|\[/?[A-Z_]+\]|<\|[a-z_]+>|<[a-z_]+\|>|\[\|[a-z]+\|\]"
)
_ADDED = re.compile(r"</?[a-z_]+>|<\|\"\|>")
"""What many tokenizers have as a token of its own, and as text."""


@cache
def tokenizer_of(family: str, folder: Path | None = None) -> Any:
    """A token a character, or the tokenizer of a folder; and those that the template sets between turns."""
    template = (TEMPLATES | GIVEN)[family]
    tokenizer = make_tokenizer(template) if folder is None else AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = template
    tokenizer.add_special_tokens({"additional_special_tokens": sorted({*_SPECIAL.findall(template)})})
    if family in GIVEN:
        tokenizer.add_tokens(sorted({*_ADDED.findall(template)} - {*tokenizer.all_special_tokens}))
    return tokenizer


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_time",
            "description": "Time in a city",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def answer(content: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


SYSTEM = {"role": "system", "content": "Be brief."}
CALL = {"id": "call00001", "type": "function", "function": {"name": "get_time", "arguments": '{"city": "Oslo"}'}}
ASKED = user("What time is it in Oslo?")
CONVERSATIONS: dict[str, dict[str, Any]] = {
    "single turn": {"messages": [user("Name a river."), answer("The Elbe.")]},
    "many turns": {
        "messages": [
            user("Name a tree."),
            answer("Oak."),
            user("Another?"),
            answer("Birch."),
            user("And?"),
            answer("Elm."),
        ]
    },
    "system": {"messages": [SYSTEM, user("Name a tree."), answer("Oak."), user("Another?"), answer("Birch.")]},
    "tools": {
        "tools": TOOLS,
        "messages": [
            ASKED,
            answer("", tool_calls=[CALL]),
            {"role": "tool", "tool_call_id": "call00001", "name": "get_time", "content": "14:05"},
            answer("It is 14:05 in Oslo."),
        ],
    },
    "reasoning": {
        "messages": [
            user("17 + 5?"),
            answer("22", reasoning_content="Seventeen and five make twenty-two."),
            user("And 3 more?"),
            answer("25", reasoning_content="Three more than twenty-two."),
        ]
    },
    "thoughts within the words": {
        "messages": [user("2 + 2?"), answer("<think>\nTwo and two.\n</think>\n\n4"), user("3 + 3?"), answer("6")]
    },
    "answers that occur in the question": {
        "messages": [user("Is water wet, yes or no?"), answer("yes"), user("yes? Say yes or no."), answer("yes")]
    },
    "a turn that is excluded": {
        "messages": [
            user("Capital of France?"),
            answer("Lyon.", weight=0),
            user("Sure?"),
            answer("No: Paris.", weight=1),
        ]
    },
}


def outside(text: str, spans: list[tuple[int, int]]) -> Iterator[str]:
    """What is between the spans."""
    position = 0
    for start, end in [*spans, (len(text), len(text))]:
        yield text[position:start]
        position = end


WORDS = (
    "yes",
    "no",
    "Oslo",
    "14:05",
    "the Elbe",
    "naïve café",
    "河",
    "🙂",
    "[INST]",
    "assistant\n",
    "<b>",
    "a  b",
    "\n\n",
    '"x"',
)


def random_conversation(seed: int) -> dict[str, Any]:
    """A row by a grammar: roles, tools, parts, flags, thoughts, null fields; answers that the questions hold."""
    chance = random.Random(seed)

    def words(least: int = 1) -> str:
        text = " ".join(chance.choices(WORDS, k=chance.randint(least, 6)))
        return text if text.strip() else "yes"

    def content(text: str) -> Any:
        return chance.choice([text, text, text, [{"type": "text", "text": text}]])

    def said() -> dict[str, Any]:
        turn = {"role": "assistant", "content": content(words())}
        if chance.random() < 0.2:
            turn["reasoning_content"] = words()
        elif chance.random() < 0.15:
            turn["content"] = f"<think>\n{words()}\n</think>\n\n{words()}"
        if chance.random() < 0.2:
            turn[chance.choice(["weight", "train"])] = chance.choice([0, 1])
        return turn | {key: None for key in ("refusal", "tool_calls", "name") if chance.random() < 0.2}

    turns: list[dict[str, Any]] = []
    row: dict[str, Any] = {"messages": turns, "id": seed, "source": "nowhere", "system": None}
    if chance.random() < 0.3:
        turns.append({"role": chance.choice(["system", "developer"]), "content": words()})
    with_tools = chance.random() < 0.3
    for _ in range(chance.randint(1, 5)):
        turns.append({"role": "user", "content": content(words())})
        if with_tools and chance.random() < 0.5:
            arguments = {"city": words()}
            given = chance.choice([arguments, json.dumps(arguments)])
            for _ in range(chance.choice([1, 1, 2])):
                name = f"call{chance.randint(0, 99999):05d}"
                call = {"id": name, "type": "function", "function": {"name": "get_time", "arguments": given}}
                turns.append({"role": "assistant", "content": chance.choice([None, ""]), "tool_calls": [call]})
                turns.append({"role": "tool", "tool_call_id": name, "name": "get_time", "content": words()})
        turns.append(said())
    if chance.random() < 0.2:
        turns.append({"role": "user", "content": words()})
    if with_tools:
        row["tools"] = chance.choice([TOOLS, json.dumps(TOOLS)])
    return row

"""Which tokens of a conversation are learned, family by family, as a person can read it: tests/golden/*.txt.

`GOLDEN=write pytest tests/unit/test_golden_chats.py` writes them anew, to be read before they are committed.
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from qdora import chat_template
from qdora.chat_template import render, turn_ends
from qdora.config import DataConfig, DataFormat
from qdora.data.conversation import Told
from qdora.data.encode import encode, encode_prompt
from qdora.data.sources import Row
from qdora.errors import DataError
from qdora.model.export import write_checkpoint
from qdora.model.generate import end_tokens
from qdora.model.writer import Job
from tests.support.chats import CONVERSATIONS, GOLDEN, TEMPLATES, answer, tokenizer_of, user
from tests.support.models import make_model


def shown(family: str, values: dict[str, object]) -> str:
    """The conversation with what is learned in brackets, or why it is refused; and what is told of it."""
    tokenizer, told = tokenizer_of(family), Told()
    try:
        ids, mask = encode(Row(values, "the row"), DataFormat.messages, tokenizer, DataConfig(), told)
    except DataError as error:
        return f"refused: {error}"
    pieces = []
    for index, (token, learned) in enumerate(zip(ids, mask, strict=True)):
        before, after = mask[index - 1] if index else False, mask[index + 1] if index + 1 < len(mask) else False
        pieces.append("⟦" * (learned and not before) + tokenizer.decode([token]) + "⟧" * (learned and not after))
    notes = [f"told: {line}" for line in told.lines()]
    return "\n".join(["".join(pieces), *notes])


@pytest.mark.parametrize("family", TEMPLATES)
def test_what_is_learned_is_what_the_golden_file_shows(family: str) -> None:
    text = "\n".join(f"== {name}\n{shown(family, values)}\n" for name, values in CONVERSATIONS.items())
    file = GOLDEN / f"{family}.txt"
    if os.environ.get("GOLDEN") == "write":
        file.write_text(text, encoding="utf-8")
    assert text == file.read_text(encoding="utf-8")


@pytest.mark.parametrize("family", TEMPLATES)
def test_the_prompt_for_an_answer_is_where_the_learned_part_begins(family: str) -> None:
    """But for a thought that a template begins in its prompt and never shows of an answer that has none."""
    row = Row(CONVERSATIONS["single turn"], "the row")
    tokenizer = tokenizer_of(family)
    ids, mask = encode(row, DataFormat.messages, tokenizer)
    prompt = encode_prompt(row, DataFormat.messages, tokenizer)
    start = mask.index(True)
    assert ids[:start] == prompt[:start]
    assert len(prompt) == start or family == "deepseek_r1"


@pytest.mark.parametrize("family", TEMPLATES)
def test_renderings_do_not_grow_with_the_turns(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A conversation is rendered four times, and what a template puts around a turn is looked up once a template."""
    counts = []
    for number in (2, 40):
        turns = [turn for index in range(number) for turn in (user(f"Question {index}?"), answer(f"It is {index}."))]
        texts: list[str] = []

        def counted(*args: Any, texts: list[str] = texts) -> str:
            texts.append(render(*args))
            return texts[-1]

        monkeypatch.setattr(chat_template, "render", counted)
        chat_template._edges.cache_clear()
        _, mask = encode(Row({"messages": turns}, "the row"), DataFormat.messages, tokenizer_of(family))
        assert sum(mask) > number
        counts.append(len(texts))
    assert counts[0] == counts[1] <= 9


ENDS = {
    "chatml": {"<|im_end|>"},
    "command_r": {"<|END_OF_TURN_TOKEN|>"},
    "deepseek_r1": {"</s>"},
    "gemma2": {"<end_of_turn>"},
    "gemma3": {"<end_of_turn>"},
    "glm4_5": {"<|user|>"},
    "gpt_oss": {"<|return|>", "<|end|>"},
    "llama2": {"</s>"},
    "llama3_1": {"<|eot_id|>"},
    "mistral_nemo": {"</s>"},
    "mistral_v0_1": {"</s>"},
    "mistral_v0_3": {"</s>"},
    "phi3": {"<|end|>"},
    "phi4": {"<|im_end|>"},
    "qwen2_5": {"<|im_end|>"},
    "qwen3": {"<|im_end|>"},
    "qwen3_thinking_off": {"<|im_end|>"},
    "smollm2": {"<|im_end|>"},
    "smollm3": {"<|im_end|>"},
}


@pytest.mark.parametrize("family", TEMPLATES)
def test_answers_end_with_what_ends_a_turn(family: str, tmp_path: Path) -> None:
    """Also where the end of sequence of tokenizer and model is another token."""
    tokenizer = tokenizer_of(family)
    ends = {tokenizer.convert_tokens_to_ids(token) for token in ENDS[family]}
    assert turn_ends(tokenizer) == ends
    assert {*end_tokens(tokenizer, tmp_path)} == ends | {tokenizer.eos_token_id}


def test_export_names_what_ends_a_turn(tmp_path: Path) -> None:
    """A base whose end of sequence is another token, trained on turns."""
    base, output = make_model(tmp_path / "base", "llama", vocab_size=300), tmp_path / "output"
    tokenizer_of("chatml").save_pretrained(base)
    end = tokenizer_of("chatml").convert_tokens_to_ids("<|im_end|>")
    output.mkdir()
    jobs = [Job("weight", (1,), torch.float32, lambda: lambda first, last: torch.zeros(1)[first:last])]
    write_checkpoint(output, jobs, base, "test", dtype=torch.float32, max_shard_bytes=2**30, workers=1)
    assert json.loads((base / "generation_config.json").read_text())["eos_token_id"] == 2
    assert json.loads((output / "generation_config.json").read_text())["eos_token_id"] == [2, end]

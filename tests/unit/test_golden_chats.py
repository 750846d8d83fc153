"""Which tokens of a conversation are learned, family by family, as a person can read it: tests/golden/*.txt.

`GOLDEN=write pytest tests/unit/test_golden_chats.py` writes them anew, to be read before they are committed.
"""

import os

import pytest

from qdora.config import DataConfig, DataFormat
from qdora.data import spans
from qdora.data.conversation import Told
from qdora.data.encode import encode, encode_prompt
from qdora.data.sources import Row
from qdora.data.spans import render
from qdora.errors import DataError
from tests.support.chats import CONVERSATIONS, GOLDEN, TEMPLATES, answer, tokenizer_of, user


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
        texts = []
        monkeypatch.setattr(spans, "render", lambda *args, texts=texts: texts.append(render(*args)) or texts[-1])
        spans._edges.cache_clear()
        _, mask = encode(Row({"messages": turns}, "the row"), DataFormat.messages, tokenizer_of(family))
        assert sum(mask) > number
        counts.append(len(texts))
    assert counts[0] == counts[1] <= 9

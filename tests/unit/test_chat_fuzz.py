"""Conversations by a grammar, over every template of tests/golden: what is learned is what the assistant said.

`QDORA_TEMPLATES=FOLDER pytest tests/unit/test_chat_fuzz.py` takes the .jinja files of a folder, too.
"""

import re
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from qdora.chat_template import Span, assistant_spans, template_of, with_calls_shown, with_thoughts_shown
from qdora.config import DataConfig, DataFormat
from qdora.data.conversation import Conversation, conversation
from qdora.data.encode import NothingToLearn, encode
from qdora.data.sources import Row
from qdora.errors import DataError
from tests.support.chats import GIVEN, TEMPLATES, outside, random_conversation, tokenizer_of
from tests.support.marks import nightly

ALLOWED = re.compile("does not fit the model's chat template|does not show tool calls")
"""What a family's template cannot hold; everything else is encoded."""


def spans_of(given: Conversation, learned: list[bool], tokenizer: Any) -> tuple[str, list[Span]]:
    """The text and what of it those turns are."""
    template = template_of(tokenizer, given.tools, given.variables)
    messages = with_thoughts_shown(given.messages, tokenizer, template)
    messages = with_calls_shown(messages, tokenizer, template)
    return assistant_spans(messages, learned, given.tools, tokenizer, template, "the row")


def check(family: str, seed: int, folder: Path) -> bool:
    """Whether the row could be encoded; asserts what has to hold then."""
    row, tokenizer = Row(random_conversation(seed), "the row"), tokenizer_of(family, folder)
    try:
        ids, mask = encode(row, DataFormat.messages, tokenizer, DataConfig())
    except NothingToLearn:
        assert not any(conversation(row, DataFormat.messages).learned)
        return False
    except DataError as error:
        if not ALLOWED.search(str(error)):
            raise
        return False
    given = conversation(row, DataFormat.messages)
    text, spans = spans_of(given, given.learned, tokenizer)
    turns = [message for message, learned in zip(given.messages, given.learned, strict=True) if learned]
    assert len(spans) == len(turns)
    assert spans == sorted(spans)
    every = [message["role"] == "assistant" for message in given.messages]
    others = deepcopy(given)
    for message in others.messages:
        if message["role"] == "assistant":
            _, closes, words = message["content"].rpartition("</think>")
            thought = "<think>\nAnother.\n</think>\n\n" if closes else ""  # a prompt may hold an empty one
            message["content"] = thought + ("Something else." if words else "")
            for call in message.get("tool_calls", []):
                call["function"]["arguments"] = {"x": 1}
    of_these, of_others = (outside(*spans_of(some, every, tokenizer)) for some in (given, others))
    assert [*of_these] == [*of_others], "other words in the answers change what is not said by the assistant"
    ends = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    for (start, end), message in zip(spans, turns, strict=True):
        said = text[start:end]
        answer = message["content"].rpartition("</think>")[2].strip()
        assert answer in said
        assert any(said.endswith(token) for token in ends), said
        for call in message.get("tool_calls", []):
            assert call["function"]["name"] in said
    # Every character once, and no other but a blank that a token has before it.
    learned = tokenizer.decode([token for token, one in zip(ids, mask, strict=True) if one])
    wanted = "".join(text[start:end] for start, end in spans)
    assert learned.replace(" ", "").replace("\n", "") == wanted.replace(" ", "").replace("\n", "")
    assert 0 <= len(learned) - len(wanted) <= 2 * len(spans)
    return True


@pytest.mark.parametrize("family", [*TEMPLATES, *GIVEN])
@pytest.mark.parametrize("seeds", [range(13), *nightly(range(13, 640))], ids=["some", "many"])
def test_what_is_learned_is_what_the_assistant_said(family: str, seeds: range, smollm2: Path) -> None:
    encoded = [check(family, seed, smollm2) for seed in seeds]
    assert sum(encoded) >= len(encoded) // 5 or family in GIVEN

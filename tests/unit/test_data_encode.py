"""What of a sample is learned: exactly what the assistant said, and its end."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, ByT5Tokenizer

from qdora.chat_template import DEFAULT_TEMPLATE
from qdora.config import DataFormat
from qdora.data.conversation import Told
from qdora.data.encode import detect, encode, encode_prompt, reference, with_answer
from qdora.data.sources import Row
from qdora.errors import DataError
from tests.support.models import byte_fallback, make_tokenizer

LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] | trim + '<|eot|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}"
    "{% else %}{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}{{ '<start>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' "
    "+ m['content'] | trim + '<end>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start>model\n' }}{% endif %}"
)
QWEN3 = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ '<im>assistant\n' }}"
    "{% if loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{{ m['content'] + '</im>\n' }}"
    "{% else %}{{ '<im>' + m['role'] + '\n' + m['content'] + '</im>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<im>assistant\n' }}{% endif %}"
)
TURNS = [
    {"role": "user", "content": "Hello there"},
    {"role": "assistant", "content": "Good day"},
    {"role": "user", "content": "Good day?"},
    {"role": "assistant", "content": "Yes, good day."},
]
COMPLETION = DataFormat.completion
CHAT = Row({"messages": TURNS}, "a.jsonl line 1")


def learned(row: Row, form: DataFormat, tokenizer: Any) -> str:
    """The learned tokens as text."""
    ids, mask = encode(row, form, tokenizer)
    return str(tokenizer.decode([token for token, one in zip(ids, mask, strict=True) if one]))


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (LLAMA3, "Good day<|eot|>Yes, good day.<|eot|>"),
        (MISTRAL, " Good day</s> Yes, good day.</s>"),
        (GEMMA, "Good day<end>Yes, good day.<end>"),
        (QWEN3, "Good day</im><think>\n\n</think>\n\nYes, good day.</im>"),
        (DEFAULT_TEMPLATE, "Good day</s>Yes, good day.</s>"),
        (None, "Good day</s>Yes, good day.</s>"),
    ],
    ids=["llama3", "mistral", "gemma", "qwen3", "default", "no-template"],
)
def test_chat_learns_what_the_assistant_said(template: str | None, expected: str) -> None:
    tokenizer = make_tokenizer(template)
    assert learned(CHAT, DataFormat.messages, tokenizer).replace(" ", "") == expected.replace(" ", "")


def test_chat_of_the_real_model_learns_answers_and_their_ends(smollm2: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    assert learned(CHAT, DataFormat.messages, tokenizer) == "Good day<|im_end|>Yes, good day.<|im_end|>"


def test_chat_has_the_tokens_of_the_template(smollm2: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    ids, _ = encode(CHAT, DataFormat.messages, tokenizer)
    assert ids == tokenizer(tokenizer.apply_chat_template(TURNS, tokenize=False), add_special_tokens=False)["input_ids"]


def test_answer_that_the_question_repeats_is_found_in_its_own_place(smollm2: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    turns = [{"role": "user", "content": "Say yes"}, {"role": "assistant", "content": "yes"}]
    ids, mask = encode(Row({"messages": turns}, "x"), DataFormat.messages, tokenizer)
    assert tokenizer.decode(ids[: mask.index(True)]).endswith("<|im_start|>assistant\n")


@pytest.mark.parametrize("text", ["\U0001f994 ok", "ሰላም"])
def test_every_byte_of_a_character_that_is_not_in_the_vocabulary_is_learned(text: str) -> None:
    tokenizer = byte_fallback()
    tokenizer.add_special_tokens({"eos_token": "</s>"})
    row = Row({"prompt": "Name a ", "completion": text}, "x")
    ids, learned = encode(row, DataFormat.completion, tokenizer)
    taught = [number for number, one in zip(ids, learned, strict=True) if one]
    assert tokenizer.decode(taught) == f"{text}</s>"
    assert sum(token.startswith("<0x") for token in tokenizer.convert_ids_to_tokens(taught)) >= 4


def test_sharegpt_is_the_same_conversation() -> None:
    tokenizer = make_tokenizer(LLAMA3)
    turns = [{"from": {"user": "human", "assistant": "gpt"}[t["role"]], "value": t["content"]} for t in TURNS]
    sharegpt = Row({"conversations": turns}, "x")
    assert encode(sharegpt, DataFormat.messages, tokenizer) == encode(CHAT, DataFormat.messages, tokenizer)


def test_tools_reach_the_template() -> None:
    template = "{% if tools %}{{ tools[0]['function']['name'] + '\n' }}{% endif %}" + LLAMA3
    row = Row({"messages": TURNS, "tools": json.dumps([{"name": "lookup", "parameters": {}}])}, "x")
    tokenizer = make_tokenizer(template)
    ids, _ = encode(row, DataFormat.messages, tokenizer)
    assert tokenizer.decode(ids).replace(" ", "").startswith("lookup")


@pytest.mark.parametrize("given", ["", "some context"])
def test_instruction_learns_the_output(smollm2: Path, given: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    row = Row({"instruction": "Do it", "input": given, "output": "Done."}, "x")
    ids, _ = encode(row, DataFormat.instruction, tokenizer)
    assert learned(row, DataFormat.instruction, tokenizer) == "Done.<|im_end|>"
    assert ("Do it\n\nsome context<|im_end|>" if given else "Do it<|im_end|>") in tokenizer.decode(ids)


def test_completion_learns_the_completion_and_the_end(smollm2: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    row = Row({"prompt": "One two", "completion": " three four"}, "x")
    ids, mask = encode(row, DataFormat.completion, tokenizer)
    assert learned(row, DataFormat.completion, tokenizer) == " three four" + tokenizer.eos_token
    assert tokenizer.decode(ids) == "One two three four" + tokenizer.eos_token
    assert mask[-1]


def test_text_learns_everything_and_the_end(smollm2: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    _, mask = encode(Row({"text": "One two three"}, "x"), DataFormat.text, tokenizer)
    assert all(mask)
    assert learned(Row({"text": "One two"}, "x"), DataFormat.text, tokenizer) == "One two" + tokenizer.eos_token


def ending_tokenizer(kind: str) -> Any:
    """A tokenizer that itself ends every text: a fast one that also begins it, or one in Python."""
    if kind == "slow":
        return ByT5Tokenizer()
    tokenizer = make_tokenizer()
    special_tokens = [("<s>", 1), ("</s>", 2)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<s> $A </s>", special_tokens=special_tokens)
    return tokenizer


@pytest.mark.parametrize("text", ["<s>abcd", "abcd</s>", "<s>abcd</s>"])
def test_ends_that_the_text_has_already_are_kept_once(text: str) -> None:
    tokenizer, told = ending_tokenizer("fast"), Told()
    prompt, completion = text[: text.index("c")], text[text.index("c") :]
    for values, form in (({"text": text}, DataFormat.text), ({"prompt": prompt, "completion": completion}, COMPLETION)):
        ids, mask = encode(Row(values, "x"), form, tokenizer, told=told)
        assert tokenizer.convert_ids_to_tokens(ids) == ["<s>", "a", "b", "c", "d", "</s>"]
        assert mask[-3:] == [True] * 3
    assert sum(line.endswith("kept once (2 times, first in x)") for line in told.lines()) == text.count("s>")
    asked = encode_prompt(Row({"prompt": prompt}, "x"), COMPLETION, tokenizer)
    assert tokenizer.convert_ids_to_tokens(asked) == ["<s>", "a", "b"]


@pytest.mark.parametrize("kind", ["fast", "slow"])
def test_end_that_the_tokenizer_puts_is_learned_once(kind: str) -> None:
    tokenizer = ending_tokenizer(kind)
    given = ["<s>"] if kind == "fast" else []
    for values, form, unlearned in (
        ({"prompt": "ab", "completion": "cd"}, DataFormat.completion, [*given, "a", "b"]),
        ({"text": "abcd"}, DataFormat.text, given),
    ):
        ids, mask = encode(Row(values, "x"), form, tokenizer)
        assert tokenizer.convert_ids_to_tokens(ids) == [*given, "a", "b", "c", "d", "</s>"]
        assert mask == [False] * len(unlearned) + [True] * (len(ids) - len(unlearned))


@pytest.mark.parametrize("kind", ["fast", "slow"])
def test_prompt_does_not_end_where_it_is_to_be_continued(kind: str) -> None:
    tokenizer = ending_tokenizer(kind)
    row = Row({"prompt": "ab", "completion": "cd"}, "x")
    ids, _ = encode(row, DataFormat.completion, tokenizer)
    prompt = encode_prompt(row, DataFormat.completion, tokenizer)
    assert prompt == ids[: len(prompt)]
    assert len(ids) - len(prompt) == len("cd") + 1


MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_generation_markers_change_nothing_and_agree(smollm2: Path) -> None:
    """transformers takes the mask from the markers; here it is found without them."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    tokenizer.chat_template = MARKED
    ids, mask = encode(CHAT, DataFormat.messages, tokenizer)
    theirs = tokenizer.apply_chat_template(TURNS, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    assert ids == theirs["input_ids"]
    assert [int(one) for one in mask] == theirs["assistant_masks"]
    assert sum(mask) > 5
    tokenizer.chat_template = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    assert encode(CHAT, DataFormat.messages, tokenizer) == (ids, mask)


@pytest.mark.parametrize(
    ("values", "form"),
    [
        ({"messages": []}, DataFormat.messages),
        ({"conversations": []}, DataFormat.messages),
        ({"instruction": "", "output": "", "answer": 1, "task": "x"}, DataFormat.instruction),
        ({"prompt": "", "completion": ""}, DataFormat.completion),
        ({"text": ""}, DataFormat.text),
    ],
)
def test_format_is_found_by_the_keys(values: dict[str, Any], form: DataFormat) -> None:
    assert detect(Row(values, "x")) is form


def test_unknown_keys_are_told_with_what_is_accepted() -> None:
    with pytest.raises(DataError, match=r"line 7 has the keys \['question'\]; accepted are messages: .*text: text"):
        detect(Row({"question": "?"}, "a.jsonl line 7"))


@pytest.mark.parametrize(
    ("values", "form", "message"),
    [
        ({"prompt": "a"}, DataFormat.completion, "line 7 has no 'completion'"),
        ({"prompt": "a", "completion": 3}, DataFormat.completion, "line 7: completion must be a text"),
        ({"text": ""}, DataFormat.text, "line 7: text must be a text and not empty"),
        ({"text": "a\ud800"}, DataFormat.text, "line 7: text must be a text and not empty"),
        ({"messages": [{"role": ["user"], "content": "a"}]}, DataFormat.messages, "line 7: a turn has role"),
        ({"messages": [{"role": "user", "content": "\udfff"}]}, DataFormat.messages, "line 7: a turn has role"),
        ({"instruction": "a", "input": 3, "output": "b"}, DataFormat.instruction, "line 7: input must be a text"),
        ({"messages": TURNS, "tools": [3]}, DataFormat.messages, "line 7: tools must be a list of objects"),
        ({"messages": []}, DataFormat.messages, "line 7: messages must be a list"),
        (
            {"prompt": "a"},
            DataFormat.messages,
            r"line 7 has no messages, as the format messages wants; it has \['prompt'",
        ),
        ({"messages": [{"role": "boss", "content": "a"}]}, DataFormat.messages, "line 7: a turn has role"),
        ({"messages": TURNS[:1]}, DataFormat.messages, "line 7 has no assistant turn"),
        ({"messages": TURNS, "tools": "{"}, DataFormat.messages, "line 7: tools is not JSON"),
    ],
)
def test_row_that_does_not_fit_is_told(values: dict[str, Any], form: DataFormat, message: str) -> None:
    with pytest.raises(DataError, match=message):
        encode(Row(values, "a.jsonl line 7"), form, make_tokenizer(LLAMA3))


def test_template_that_refuses_a_role_is_told() -> None:
    row = Row({"messages": [{"role": "system", "content": "x"}, *TURNS]}, "a.jsonl line 7")
    with pytest.raises(DataError, match="line 7 does not fit the model's chat template: only user and assistant"):
        encode(row, DataFormat.messages, make_tokenizer(MISTRAL))


@pytest.mark.parametrize("form", [DataFormat.messages, DataFormat.completion])
def test_prompt_and_answer_make_the_sample(smollm2: Path, form: DataFormat) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    row = CHAT if form is DataFormat.messages else Row({"prompt": "One two", "completion": " three"}, "x")
    ids, _ = encode(row, form, tokenizer)
    prompt = encode_prompt(row, form, tokenizer)
    assert ids[: len(prompt)] == prompt
    assert tokenizer.decode(ids[len(prompt) :]).startswith(reference(row, form))


def test_other_answer_replaces_the_last_one(smollm2: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    other = with_answer(CHAT, DataFormat.messages, "No.")
    assert learned(other, DataFormat.messages, tokenizer) == "Good day<|im_end|>No.<|im_end|>"

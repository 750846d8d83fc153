"""From a row to token ids and the mask of what is learned.

    format        keys                                         learned
    messages      messages: [{role, content}]                  every assistant turn with its end-of-turn token
                  conversations: [{from, value}] (ShareGPT)    the same; `tools` (JSON) goes to the template
    instruction   instruction, input (optional), output        the output, as the answer to one user turn
    completion    prompt, completion                           the completion and the end of sequence; no template
    text          text                                         everything and the end of sequence

Turns go through the tokenizer's chat template; a base model without one gets `DEFAULT_TEMPLATE`. Which characters an
assistant said is found by rendering the conversation up to each turn, so that templates without generation markers
work, and which tokens those are by the tokenizer's offsets.
"""

import itertools
import json
from typing import Any, TypeGuard

import jinja2

from qdora.config import DataFormat
from qdora.data.sources import Row
from qdora.errors import DataError

DEFAULT_TEMPLATE = (
    "{{ bos_token or '' }}{% for message in messages %}"
    "{{ '### ' + message['role'].capitalize() + ':\n' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '### Assistant:\n' }}{% endif %}"
)
_KEYS = {
    DataFormat.messages: "messages (or conversations)",
    DataFormat.instruction: "instruction, output (and input)",
    DataFormat.completion: "prompt, completion",
    DataFormat.text: "text",
}
_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "user": "user",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
}

Encoded = tuple[list[int], list[bool]]
"""Token ids, and for each whether it is to be learned."""


def detect(row: Row) -> DataFormat:
    """The format of a row, by its keys.

    Raises:
        DataError: none of the formats has these keys.
    """
    keys = row.values.keys()
    for needed, found in (
        ({"messages"}, DataFormat.messages),
        ({"conversations"}, DataFormat.messages),
        ({"instruction", "output"}, DataFormat.instruction),
        ({"prompt", "completion"}, DataFormat.completion),
        ({"text"}, DataFormat.text),
    ):
        if needed <= keys:
            return found
    accepted = "; ".join(f"{form.name}: {names}" for form, names in _KEYS.items())
    raise DataError(f"{row.where} has the keys {sorted(keys)}; accepted are {accepted}")


def encode(row: Row, form: DataFormat, tokenizer: Any) -> Encoded:
    """The whole sample.

    Raises:
        DataError: the row lacks a key of `form`, has a value that is not text, or does not fit the chat template.
    """
    if form is DataFormat.text:
        return _encode_plain("", _text(row, "text", form), tokenizer)
    if form is DataFormat.completion:
        return _encode_plain(_text(row, "prompt", form), _text(row, "completion", form), tokenizer)
    messages = conversation(row, form)
    if not any(message["role"] == "assistant" for message in messages):
        raise DataError(f"{row.where} has no assistant turn, so there is nothing to learn")
    return _encode_chat(messages, _tools(row), tokenizer, row.where)


def encode_prompt(row: Row, form: DataFormat, tokenizer: Any) -> list[int]:
    """Everything up to the last answer, ready to be continued."""
    if form in (DataFormat.completion, DataFormat.text):
        prompt = _text(row, "prompt" if form is DataFormat.completion else "text", form)
        ids, _ = _tokenize(prompt, [], tokenizer, special_tokens=True)
        plain, _ = _tokenize(prompt, [], tokenizer, special_tokens=False)
        end = [tokenizer.eos_token_id]
        # Some tokenizers end every text, and after an end nothing would come.
        return ids[:-1] if ids[-1:] == end != plain[-1:] else ids
    messages = conversation(row, form)
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    text = _render(messages, _tools(row), tokenizer, row.where, generation_prompt=True)
    return _tokenize(text, [], tokenizer, special_tokens=False)[0]


def reference(row: Row, form: DataFormat) -> str:
    """The answer that `encode_prompt` leaves out."""
    if form is DataFormat.text:
        return ""
    if form is DataFormat.completion:
        return _text(row, "completion", form)
    answers = [message["content"] for message in conversation(row, form) if message["role"] == "assistant"]
    return str(answers[-1]) if answers else ""


def with_answer(row: Row, form: DataFormat, answer: str) -> Row:
    """The row with another last answer."""
    values = dict(row.values)
    if form is DataFormat.instruction:
        values["output"] = answer
    elif form is DataFormat.completion:
        values["completion"] = answer
    else:
        messages = conversation(row, form)
        if messages[-1]["role"] == "assistant":
            messages.pop()
        messages.append({"role": "assistant", "content": answer})
        values.pop("conversations", None)
        values["messages"] = messages
    return Row(values, row.where)


def conversation(row: Row, form: DataFormat) -> list[dict[str, str]]:
    """The turns of a messages or instruction row, roles in transformers' words.

    Raises:
        DataError: a turn without a role or a text.
    """
    if form is DataFormat.instruction:
        user = _text(row, "instruction", form)
        if row.values.get("input"):
            user = f"{user}\n\n{_text(row, 'input', form)}"
        return [{"role": "user", "content": user}, {"role": "assistant", "content": _text(row, "output", form)}]
    turns = row.values.get("messages", row.values.get("conversations"))
    if not isinstance(turns, list) or not turns:
        if turns is None:
            raise DataError(f"{row.where} has no messages, as data.format={form.name} wants; it has {[*row.values]}")
        raise DataError(f"{row.where}: messages must be a list of turns and not empty, this is {turns!r:.60}")
    messages = []
    for turn in turns:
        said = turn if isinstance(turn, dict) else {}
        role, content = said.get("role", said.get("from")), said.get("content", said.get("value"))
        if not isinstance(role, str) or role not in _ROLES or not _is_text(content):
            raise DataError(
                f"{row.where}: a turn has role (or from), one of {', '.join(_ROLES)}, and content (or value), a text; "
                f"this is {turn!r:.80}"
            )
        messages.append({"role": _ROLES[role], "content": content})
    return messages


def _text(row: Row, key: str, form: DataFormat) -> str:
    value = row.values.get(key)
    if key not in row.values:
        raise DataError(
            f"{row.where} has no {key!r}; the format {form.name} wants {_KEYS[form]}, found {[*row.values]}"
        )
    if not value or not _is_text(value):
        raise DataError(f"{row.where}: {key} must be a text and not empty, this is {value!r:.60}")
    return value


def _is_text(value: Any) -> TypeGuard[str]:
    """A string that UTF-8 can hold: JSON can also write half of a surrogate pair."""
    return isinstance(value, str) and not any("\ud800" <= character <= "\udfff" for character in value)


def _tools(row: Row) -> list[Any] | None:
    tools = row.values.get("tools")
    if not tools:
        return None
    try:
        parsed = json.loads(tools) if isinstance(tools, str) else tools
    except json.JSONDecodeError as error:
        raise DataError(f"{row.where}: tools is not JSON: {error}") from None
    if not isinstance(parsed, list) or not all(isinstance(tool, dict) for tool in parsed):
        raise DataError(f"{row.where}: tools must be a list of objects, this is {parsed!r:.60}")
    return [tool if "function" in tool else {"type": "function", "function": tool} for tool in parsed]


def _render(
    messages: list[dict[str, str]], tools: Any, tokenizer: Any, where: str, generation_prompt: bool = False
) -> str:
    template = None if tokenizer.chat_template else DEFAULT_TEMPLATE
    try:
        return tokenizer.apply_chat_template(  # type: ignore[no-any-return]
            messages,
            tools=tools,
            tokenize=False,
            add_generation_prompt=generation_prompt,
            chat_template=template,
        )
    except (jinja2.TemplateError, TypeError, ValueError) as error:
        raise DataError(f"{where} does not fit the model's chat template: {error}") from None


def _encode_chat(messages: list[dict[str, str]], tools: Any, tokenizer: Any, where: str) -> Encoded:
    whole = _render(messages, tools, tokenizer, where)
    spans: list[tuple[int, int]] = []
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            spans.append(_span(whole, messages, index, spans[-1][1] if spans else 0, tools, tokenizer, where))
    return _tokenize(whole, spans, tokenizer, special_tokens=False)


def _span(
    whole: str, messages: list[dict[str, str]], index: int, after: int, tools: Any, tokenizer: Any, where: str
) -> tuple[int, int]:
    """First and last character (exclusive) of an assistant turn and its end-of-turn token in the rendered `whole`."""
    until = _render(messages[: index + 1], tools, tokenizer, where)
    before = _render(messages[:index], tools, tokenizer, where, generation_prompt=True) if index else ""
    start = len(before)
    if not index or not whole.startswith(before):
        # A template that renders an earlier turn differently once others follow: find the words themselves.
        start = whole.find(messages[index]["content"].strip(), after)
    if whole.startswith(until):
        end = len(until)
    else:
        said = messages[index]["content"].strip()
        position, position_until = whole.find(said, start), until.rfind(said)
        if position < 0 or position_until < 0:
            raise DataError(f"{where}: the model's chat template changes what the assistant says in turn {index + 1}")
        end = position + len(said)
        tail = until[position_until + len(said) :]
        end += sum(1 for _ in itertools.takewhile(bool, map(str.__eq__, tail, whole[end:])))
    if start < 0 or end <= start:
        raise DataError(f"{where}: turn {index + 1} is not to be found in what the model's chat template makes of it")
    return start, start + len(whole[start:end].rstrip())


def _encode_plain(prompt: str, learned: str, tokenizer: Any) -> Encoded:
    whole = prompt + learned
    ids, mask = _tokenize(whole, [(len(prompt), len(whole))], tokenizer, special_tokens=True)
    if tokenizer.eos_token_id is not None:
        if ids[-1:] == [tokenizer.eos_token_id]:  # put there by the tokenizer, which gives it no place in the text
            mask[-1] = True
        else:
            ids.append(tokenizer.eos_token_id)
            mask.append(True)
    return ids, mask


def _tokenize(text: str, spans: list[tuple[int, int]], tokenizer: Any, special_tokens: bool) -> Encoded:
    """Tokens of `text`, and whether each has a part in one of `spans`.

    A token may begin before: many tokenizers give the blank at the end of a prompt to the answer's first word.
    """
    if tokenizer.is_fast:
        encoded = tokenizer(text, add_special_tokens=special_tokens, return_offsets_mapping=True)
        mask = [False] * len(encoded["input_ids"])
        for index, (first, last) in enumerate(encoded["offset_mapping"]):
            mask[index] = last > first and any(first < end and start < last for start, end in spans)
        return encoded["input_ids"], mask
    ids: list[int] = []
    mask = []
    position = 0
    for start, end in [*spans, (len(text), len(text))]:
        for piece, learned in ((text[position:start], False), (text[start:end], True)):
            new = tokenizer(piece, add_special_tokens=False)["input_ids"] if piece else []
            ids += new
            mask += [learned] * len(new)
        position = end
    if special_tokens:
        whole = tokenizer.build_inputs_with_special_tokens(ids)
        before = next(start for start in range(len(whole) + 1) if whole[start : start + len(ids)] == ids)
        mask = [False] * before + mask + [False] * (len(whole) - before - len(ids))
        ids = whole
    return ids, mask

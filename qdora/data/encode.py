"""From a row to token ids and the mask of what is learned.

    format        keys                                         learned
    messages      messages: [{role, content}]                  every assistant turn with its end-of-turn token
                  conversations: [{from, value}] (ShareGPT)    the same
                  prompt, completion: lists of turns (TRL)     the assistant turns of the completion
    instruction   instruction, input (optional), output        the output, as the answer to one user turn
    completion    prompt, completion                           the completion and the end of sequence; no template
    text          text                                         everything and the end of sequence

`qdora.data.conversation` reads the turns: tool calls, thoughts, weights, system and history too. They go through the
tokenizer's chat template; a base model without one gets `DEFAULT_TEMPLATE`. `qdora.chat_template` finds which
characters an assistant said, and the tokenizer's offsets which tokens those are.
"""

import json
from collections.abc import Collection
from typing import Any

from qdora.chat_template import (
    Span,
    Template,
    assistant_spans,
    ends_with_a_token,
    render,
    shows_calls,
    template_of,
    with_calls_shown,
    with_thoughts_shown,
)
from qdora.config import DataConfig, DataFormat
from qdora.data.columns import form_of
from qdora.data.conversation import (
    KEYS,
    LENIENT,
    PREFERENCES,
    Conversation,
    Told,
    check_keys,
    conversation,
    text_of,
)
from qdora.data.guess import proposed
from qdora.data.sources import Row
from qdora.errors import DataError
from qdora.template_variables import NAME, unknown, variables_of

Encoded = tuple[list[int], list[bool]]
"""Token ids, and for each whether it is to be learned."""


class NothingToLearn(DataError):
    """A row whose answer is empty, or excluded, or absent."""


def own_form(row: Row, config: DataConfig | None = None) -> DataFormat | None:
    """Returns the format of a row by those of its keys that `data.columns` makes, or by all; None where it has none."""
    mapped = row.values.keys() & config.columns.keys() if config is not None else ()
    return form_of(row, mapped) or form_of(row, row.values)  # a row that is read by its own names has none mapped


def detect(row: Row, config: DataConfig | None = None) -> DataFormat:
    """Returns the format of a row: `data.format`, or by those of its keys that `data.columns` makes, or by all of them.

    Raises:
        DataError: none of the formats has these keys.
    """
    if config is not None and config.format is not DataFormat.auto:
        return config.format
    keys, form = row.values.keys(), own_form(row, config)
    if form is not None:
        return form
    if keys >= PREFERENCES:
        raise DataError(
            f"{row.where} has a chosen and a rejected answer and nothing else: qdora learns from answers, not from "
            "preferences"
        )
    accepted = "; ".join(f"{form.name}: {names}" for form, names in KEYS.items())
    raise DataError(f"{row.where} has the keys {sorted(keys)}; accepted are {accepted}{proposed(row)}")


def encode(
    row: Row, form: DataFormat, tokenizer: Any, config: DataConfig | None = None, told: Told | None = None
) -> Encoded:
    """Returns the whole sample of a row that `read_rows` gave, without the keys of `data.ignore_keys`.

    Args:
        config: for its `reasoning`, `unknown_keys` and the `ignore_keys` of turns; without one no key is refused.
        told: counts what a user should hear of.

    Raises:
        NothingToLearn: there is no answer, or none that counts.
        DataError: the row lacks a key of `form`, has a value that is not text, a key that changes what is learned and
            that nothing reads, or does not fit the chat template.
    """
    config, told = config or LENIENT, told or Told()
    check_keys(row, form, config, told)
    if form in (DataFormat.text, DataFormat.completion):
        *prompts, learned = ("text",) if form is DataFormat.text else ("prompt", "completion")
        answer = row.values.get(learned, "absent")
        if answer is None or (isinstance(answer, str) and not answer.strip()):
            raise NothingToLearn(f"{row.where}: {learned} must be a text and not empty, this is {answer!r}")
        prompt = "".join(text_of(row, key, form) for key in prompts)
        told.saw_system(None)
        return _encode_plain(prompt, text_of(row, learned, form), tokenizer, row.where, told)
    given = conversation(row, form, config, told)
    if not any(message["role"] == "assistant" for message in given.messages):
        raise NothingToLearn(f"{row.where} has no assistant turn, so there is nothing to learn")
    if not any(given.learned):
        raise NothingToLearn(f"{row.where}: no assistant turn says anything that counts, so there is nothing to learn")
    return _encode_chat(given, tokenizer, row.where, told)


def encode_prompt(row: Row, form: DataFormat, tokenizer: Any, config: DataConfig | None = None) -> list[int]:
    """Everything up to the last answer, ready to be continued."""
    if form in (DataFormat.completion, DataFormat.text):
        prompt = text_of(row, "prompt" if form is DataFormat.completion else "text", form)
        ids, _ = _tokenize(prompt, [], tokenizer, special_tokens=True)
        ids = ids[_is_twice(ids[:2], tokenizer.bos_token_id) :]
        plain, _ = _tokenize(prompt, [], tokenizer, special_tokens=False)
        end = [tokenizer.eos_token_id]
        # Some tokenizers end every text, and after an end nothing would come.
        return ids[:-1] if ids[-1:] == end != plain[-1:] else ids
    given = conversation(row, form, config)
    template = template_of(tokenizer, given.tools, given.variables)
    messages = _as_taken(given, tokenizer, template)
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    text = render(messages, given.tools, tokenizer, template, row.where, prompt=True)
    return _tokenize(text, [], tokenizer, special_tokens=False)[0]


def reference(row: Row, form: DataFormat) -> str:
    """The answer that `encode_prompt` leaves out."""
    if form is DataFormat.text:
        return ""
    if form is DataFormat.completion:
        return text_of(row, "completion", form)
    last = conversation(row, form).messages[-1]
    return str(last["content"]) if last["role"] == "assistant" else ""


def with_answer(row: Row, form: DataFormat, answer: str) -> Row:
    """The row with another last answer."""
    values = dict(row.values)
    if form is DataFormat.instruction:
        values["output"] = answer
    elif form is DataFormat.completion:
        values["completion"] = answer
    else:
        given = conversation(row, form)
        messages = [
            turn if learned or turn["role"] != "assistant" else turn | {"weight": 0}
            for turn, learned in zip(given.messages, given.learned, strict=True)
        ]
        if messages[-1]["role"] == "assistant":
            messages.pop()
        messages.append({"role": "assistant", "content": answer})
        values = {key: values[key] for key in ("tools", "functions", NAME) if key in values} | {"messages": messages}
    return Row(values, row.where)


def _encode_chat(given: Conversation, tokenizer: Any, where: str, told: Told) -> Encoded:
    template = template_of(tokenizer, given.tools, given.variables)
    for name in given.variables.keys() - {*variables_of(template.text)}:
        told.add(f"{NAME}: {unknown(name, template.text)}", where)
    messages = _as_taken(given, tokenizer, template)
    for index, message in enumerate(messages):
        if message.get("tool_calls") and not shows_calls(message, tokenizer, template):
            raise DataError(
                f"{where}: turn {index + 1} calls a tool, and the model's chat template does not show tool calls: give "
                "the model a template that does (chat_template.jinja in its folder), or leave such rows out"
            )
    whole, spans = assistant_spans(messages, given.learned, given.tools, tokenizer, template, where)
    missing = _tell_what_is_not_shown(given, whole, where, told)
    system = given.messages[0]["content"] if given.messages[0]["role"] == "system" else None
    told.saw_system(None if "a system turn" in missing else system)
    if not all(ends_with_a_token(whole[:end], tokenizer) for _, end in spans):
        told.add("no token ends a turn in the model's chat template, so an answer is not taught to end", where)
    return _tokenize(whole, spans, tokenizer, special_tokens=False)


def _as_taken(given: Conversation, tokenizer: Any, template: Template) -> list[dict[str, Any]]:
    messages = with_thoughts_shown(given.messages, tokenizer, template)
    return with_calls_shown(messages, tokenizer, template)


def _tell_what_is_not_shown(given: Conversation, whole: str, where: str, told: Told) -> Collection[str]:
    """Tells, and returns, which kinds of turns and the like the chat template leaves out."""
    missing: dict[str, None] = {}  # each once a row, as what is not there is searched in all of it
    position = 0
    for message in given.messages:
        role, thought = message["role"], message.get("reasoning_content")
        words = "all that an assistant turn says (a thought, say)" if role == "assistant" else f"a {role} turn"
        for what, text in ((words, message["content"]), ("the thought of an assistant turn", thought)):
            if text and what not in missing:
                found = _place(text.strip(), whole, position)
                if found is None:
                    missing[what] = None
                elif what == words:
                    position = found
    tools = [tool["function"] for tool in given.tools or [] if isinstance(tool["function"], dict)]
    if any(str(tool.get("name", "")) not in whole for tool in tools):
        missing["the tools"] = None
    for what in missing:
        told.add(f"the model's chat template does not show {what}", where)
    return missing


def _place(text: str, whole: str, after: int) -> int | None:
    """Where a text ends in the whole, as it is or as JSON writes it; from a place on, or before it."""
    for form in dict.fromkeys((text, json.dumps(text, ensure_ascii=False)[1:-1])):
        for first in (after, 0):
            place = whole.find(form, first)
            if place >= 0:
                return place + len(form)
    return None


def _is_twice(ids: list[int], token: int | None) -> bool:
    return token is not None and ids == [token] * 2


def _encode_plain(prompt: str, learned: str, tokenizer: Any, where: str, told: Told) -> Encoded:
    whole = prompt + learned
    ids, mask = _tokenize(whole, [(len(prompt), len(whole))], tokenizer, special_tokens=True)
    begun, ended = _is_twice(ids[:2], tokenizer.bos_token_id), _is_twice(ids[-2:], tokenizer.eos_token_id)
    for is_twice, token in ((begun, tokenizer.bos_token), (ended, tokenizer.eos_token)):
        if is_twice:  # a template was applied to the text already, or somebody wrote it there
            told.add(f"the text has a {token} that the tokenizer adds, too: it is kept once", where)
    ids, mask = ids[begun : len(ids) - ended], mask[begun : len(mask) - ended]
    if tokenizer.eos_token_id is not None:
        if ids[-1:] == [tokenizer.eos_token_id]:  # put there by the tokenizer, which gives it no place in the text
            mask[-1] = True
        else:
            ids.append(tokenizer.eos_token_id)
            mask.append(True)
    return ids, mask


def _tokenize(text: str, spans: list[Span], tokenizer: Any, special_tokens: bool) -> Encoded:
    """Tokens of `text`, and whether each has a part in one of `spans`.

    A token may begin before: many tokenizers give the blank at the end of a prompt to the answer's first word.
    """
    if tokenizer.is_fast:
        encoded = tokenizer(text, add_special_tokens=special_tokens, return_offsets_mapping=True)
        is_learned = bytearray(len(text))
        for start, end in spans:
            is_learned[start:end] = b"\1" * (end - start)
        mask = [1 in is_learned[first:last] for first, last in encoded["offset_mapping"]]
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

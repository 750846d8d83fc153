"""From a row to the turns of a conversation, in the words of transformers' chat templates.

Nothing of a row is dropped in silence: each key is used, known to be harmless, or told; one that changes what is
learned and that nothing here reads is an error (`data.unknown_keys`, `data.ignore_keys`).
"""

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeGuard

from qdora.config import DataConfig, DataFormat, Reasoning, UnknownKeys
from qdora.config.words import ROW_KEYS
from qdora.data.columns import is_conversational
from qdora.data.guess import HARMLESS, ROLES, as_option, proposed, turn_columns
from qdora.data.sources import Row
from qdora.errors import DataError
from qdora.template_variables import NAME, refusal

KEYS = {
    DataFormat.messages: "messages (or conversations)",
    DataFormat.instruction: "instruction, output (and input, system, history)",
    DataFormat.completion: "prompt, completion",
    DataFormat.text: "text",
}
_REASONING = ("reasoning_content", "reasoning", "thinking")
_WEIGHTS = ("weight", "train", "training")
_TURN_KEYS = {"role", "from", "content", "value", "tool_calls", "function_call", "tool_call_id", "name"}
_TURN_KEYS |= {*_REASONING, *_WEIGHTS}
_CALL_KEYS = {"id", "type", "function", "name", "arguments", "index"}
CHANGES_LEARNING = frozenset(
    [
        "weight",
        "weights",
        "train",
        "training",
        "train_detail",
        "loss",
        "loss_weight",
        "loss_mask",
        "mask",
        "labels",
        "label",
        "tools",
        "functions",
        "tool_calls",
        "function_call",
        "reasoning",
        "reasoning_content",
        "thinking",
        "thought",
        "thoughts",
        "system",
        "system_prompt",
        "history",
        "images",
        "image",
        "videos",
        "video",
        "audio",
        "audios",
        "chosen",
        "rejected",
        "chat_template_kwargs",
    ]
)
"""Keys whose loss changes what is learned."""

PREFERENCES = {"chosen", "rejected"}
LENIENT = DataConfig(unknown_keys=UnknownKeys.warn)


@dataclass(slots=True)
class Told:
    """What was seen in the rows of a file that its user should hear of: how often, and first where."""

    seen: dict[str, tuple[int, str]] = field(default_factory=dict)
    systems: set[str | None] = field(default_factory=set)
    """System turns as samples show them; None of one without. No more are kept than say that there are several."""

    def add(self, what: str, where: str) -> None:
        """Counts `what` once more."""
        count, first = self.seen.get(what, (0, where))
        self.seen[what] = (count + 1, first)

    def saw_system(self, text: str | None) -> None:
        """Notes the system turn of a sample."""
        if len(self.systems) < 2:
            self.systems.add(text)

    @property
    def system(self) -> str | None:
        """The system turn that all samples have."""
        return next(iter(self.systems)) if len(self.systems) == 1 else None

    def lines(self) -> list[str]:
        """One a kind, for people."""
        return [
            f"{what} ({count:,} time{'s' if count > 1 else ''}, first in {first})"
            for what, (count, first) in self.seen.items()
        ]


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns as chat templates take them."""

    messages: list[dict[str, Any]]
    learned: list[bool]
    """Says whether each turn is: assistant turns that their row does not exclude and that say something."""
    tools: list[Any] | None = None
    variables: dict[str, Any] = field(default_factory=dict)
    """Sets variables of the chat template, over those of the run."""


def is_text(value: Any) -> TypeGuard[str]:
    """A string that UTF-8 can hold: JSON can also write half of a surrogate pair."""
    return isinstance(value, str) and not any("\ud800" <= character <= "\udfff" for character in value)


def text_of(row: Row, key: str, form: DataFormat) -> str:
    """The text under a key that the format wants.

    Raises:
        DataError: there is none, or it is empty or no text.
    """
    if key not in row.values:
        found = f"found {[*row.values]}{proposed(row, form)}"
        raise DataError(f"{row.where} has no {key!r}; the format {form.name} wants {KEYS[form]}, {found}")
    value = row.values[key]
    if not value or not is_text(value):
        raise DataError(f"{row.where}: {key} must be a text and not empty, this is {value!r:.60}")
    return value


def check_keys(
    row: Row, form: DataFormat, config: DataConfig, told: Told, asked: Collection[str] = frozenset()
) -> None:
    """Tells which keys of a row nothing reads.

    Args:
        asked: keys that are read beside those of the format.

    Raises:
        DataError: one of them changes what is learned, and `data.unknown_keys` is `error`.
    """
    if row.values.keys() >= PREFERENCES and config.unknown_keys is UnknownKeys.error:
        raise DataError(
            f"{row.where} has a chosen and a rejected answer: these are preferences, and qdora learns from answers. "
            "data.ignore_keys=[chosen,rejected] trains on what else the row has"
        )
    _check(row.values, ROW_KEYS[form] | {*asked}, "", row.where, config, told)


def conversation(
    row: Row, form: DataFormat, config: DataConfig | None = None, told: Told | None = None
) -> Conversation:
    """The turns of a messages or instruction row.

    Raises:
        DataError: a turn without a role or a text, or with a key that nothing reads and that changes what is learned.
    """
    config, told = config or LENIENT, told or Told()
    if form is DataFormat.instruction:
        return Conversation(*_instruction(row), variables=_variables(row))
    given, completed = row.values.get("messages") or row.values.get("conversations"), 0
    if given is None and is_conversational(row):
        completed = len(row.values["prompt"])
        given = [*row.values["prompt"], *row.values["completion"]]
    if not isinstance(given, list) or not given:
        if not {"messages", "conversations"} & row.values.keys():
            found = f"it has {[*row.values]}{proposed(row, form)}"
            raise DataError(f"{row.where} has no messages, as the format {form.name} wants; {found}")
        given = row.values.get("messages", row.values.get("conversations"))
        raise DataError(f"{row.where}: messages must be a list of turns and not empty, this is {given!r:.60}")
    turns = [_turn(turn, given, row.where, config, told) for turn in given]
    messages = [message for message, _ in turns]
    learned = [one and index >= completed for index, (_, one) in enumerate(turns)]
    system = row.values.get("system")
    if system:
        if not is_text(system):
            raise DataError(f"{row.where}: system must be a text, this is {system!r:.60}")
        if messages[0]["role"] != "system":
            messages, learned = [{"role": "system", "content": system}, *messages], [False, *learned]
        elif messages[0]["content"] != system:
            raise DataError(f"{row.where} has a system turn and another text in system: leave one of them out")
    return Conversation(messages, learned, _tools(row), _variables(row))


def _instruction(row: Row) -> tuple[list[dict[str, Any]], list[bool]]:
    form = DataFormat.instruction
    messages = []
    if row.values.get("system"):
        messages.append({"role": "system", "content": text_of(row, "system", form)})
    history = row.values.get("history") or []
    if not isinstance(history, list) or not all(_is_pair(pair) for pair in history):
        raise DataError(f"{row.where}: history must be a list of [question, answer], this is {history!r:.60}")
    for question, answer in history:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    user = text_of(row, "instruction", form)
    if row.values.get("input"):
        user = f"{user}\n\n{text_of(row, 'input', form)}"
    messages.append({"role": "user", "content": user})
    output = row.values.get("output")
    messages.append({"role": "assistant", "content": "" if output in ("", None) else text_of(row, "output", form)})
    return messages, [message["role"] == "assistant" and bool(message["content"].strip()) for message in messages]


def _is_pair(pair: Any) -> bool:
    return isinstance(pair, list | tuple) and len(pair) == 2 and all(is_text(text) for text in pair)


def _for_other_names(turns: list[Any], given: Mapping[str, str]) -> str:
    """Returns the end of a refusal: the whole option that reads the turns, with what is `given` of it already."""
    columns = turn_columns(turns)
    return f". For other names: {as_option({**given, **columns})}" if columns else ""


def _turn(turn: Any, turns: list[Any], where: str, config: DataConfig, told: Told) -> tuple[dict[str, Any], bool]:
    """A turn as templates take it, and whether it is learned."""
    said = {key: value for key, value in turn.items() if key not in config.ignore_keys} if _is_object(turn) else {}
    role = said.get("role") or said.get("from")
    content = said["value"] if said.get("content") is None and "value" in said else said.get("content")
    named = ROLES.get(role) if isinstance(role, str) else None
    if named is None:
        raise DataError(
            f"{where}: a turn has role (or from), one of {', '.join(ROLES)}, and content (or value), a text; "
            f"this is {turn!r:.80}{_for_other_names(turns, config.columns)}"
        )
    _check(said, _TURN_KEYS, "a turn's ", where, config, told)
    message: dict[str, Any] = {"role": named}
    calls = said.get("tool_calls") or ([said["function_call"]] if said.get("function_call") else [])
    if role == "function_call" and is_text(content):
        calls = _written_call(content)
        if calls:
            content = ""
        else:
            told.add("a function_call turn that is not the JSON of calls is learned as a text", where)
    thought = next((said[key] for key in _REASONING if said.get(key)), None)
    if isinstance(content, list):
        content, own_thought = _joined(content, where)
        thought = thought or own_thought
    if content is None and named in ("assistant", "tool") and {"content", "value", "tool_calls"} & said.keys():
        content = ""
    if named == "tool" and isinstance(content, dict):
        content = json.dumps(content, ensure_ascii=False)
    if not is_text(content) or not (thought is None or is_text(thought)):
        raise DataError(
            f"{where}: a turn has role (or from), one of {', '.join(ROLES)}, and content (or value), a text; "
            f"this is {turn!r:.80}{_for_other_names(turns, config.columns)}"
        )
    message["content"] = content
    if named == "assistant":
        if thought and config.reasoning is Reasoning.keep:
            message["reasoning_content"] = message["thinking"] = thought  # templates have two names for it
        if calls:
            message["tool_calls"] = [_call(call, where, config, told) for call in _calls(calls, turn, where)]
    for key in ("tool_call_id", "name"):
        if said.get(key):
            message[key] = said[key]
    return message, _is_learned(said, named, where) and bool(content.strip() or calls or thought)


def _is_object(value: Any) -> TypeGuard[dict[str, Any]]:
    return isinstance(value, dict)


def _is_learned(said: Mapping[str, Any], role: str, where: str) -> bool:
    weights = {key: said[key] for key in _WEIGHTS if said.get(key) is not None}
    for key, value in weights.items():
        if value not in (0, 1):
            raise DataError(f"{where}: {key} of a turn is 0 or 1 (false or true), this is {value!r:.40}")
        if value and role != "assistant" and key != "weight":
            raise DataError(f"{where}: {key} of a {role} turn is true, and only what the assistant says is learned")
    return role == "assistant" and all(weights.values())


def _joined(parts: list[Any], where: str) -> tuple[str, str | None]:
    """The texts of the parts of a content, and its thoughts."""
    texts, thoughts = [], []
    for part in parts:
        kind = part.get("type", "text") if _is_object(part) else "text"
        value = part if isinstance(part, str) else part.get(kind) if _is_object(part) else None
        if kind in ("thinking", "reasoning") and is_text(value):
            thoughts.append(value)
        elif kind == "text" and is_text(value):
            texts.append(value)
        else:
            raise DataError(f"{where}: a part of a content is a text, and qdora trains on text; this is {part!r:.60}")
    return "\n".join(texts), "\n".join(thoughts) or None


def _written_call(text: str) -> list[Any]:
    """The calls in the JSON text of a ShareGPT turn; none where it is something else."""
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError):
        return []
    calls = parsed if isinstance(parsed, list) else [parsed]
    return calls if all(_is_object(call) and {"name", "function"} & call.keys() for call in calls) else []


def _calls(calls: Any, turn: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(calls, list) or not all(_is_object(call) for call in calls):
        raise DataError(f"{where}: tool_calls must be a list of objects, this is {turn!r:.80}")
    return calls


def _call(call: dict[str, Any], where: str, config: DataConfig, told: Told) -> dict[str, Any]:
    """A call as templates take it: its arguments an object, not the JSON of one."""
    function = call.get("function") or call
    if not _is_object(function) or not is_text(function.get("name")):
        raise DataError(f"{where}: a tool call has a function with a name and arguments, this is {call!r:.80}")
    _check(call, _CALL_KEYS, "a tool call's ", where, config, told)
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            parsed = json.loads(arguments) if arguments.strip() else {}
        except (ValueError, RecursionError):
            parsed = None
        arguments = parsed if _is_object(parsed) else arguments
    made = {
        "type": "function",
        "function": {"name": function["name"], "arguments": {} if arguments is None else arguments},
    }
    return made | ({"id": call["id"]} if call.get("id") else {})


def _check(
    values: Mapping[str, Any], used: Collection[str], of: str, where: str, config: DataConfig, told: Told
) -> None:
    for key in _unread(values, used, config.ignore_keys):
        what = f"{of}{key} is not read"
        if key in CHANGES_LEARNING and config.unknown_keys is UnknownKeys.error:
            raise DataError(
                f"{where}: {what}, and it may change what is to be learned. data.ignore_keys=[{key}] leaves it out, "
                "data.unknown_keys=warn tells of such keys and goes on"
            )
        told.add(f"{what} (data.ignore_keys=[{key}] silences this)", where)


def _unread(values: Mapping[str, Any], used: Collection[str], ignored: Collection[str]) -> Iterable[str]:
    """Keys with a value: parquet, for one, writes each key of a column into each of its rows."""
    for key, value in values.items():
        if key not in used and key not in HARMLESS and key not in ignored and value not in (None, "", [], {}):
            yield key


def _tools(row: Row) -> list[Any] | None:
    tools = row.values.get("tools") or row.values.get("functions")
    if not tools:
        return None
    try:
        parsed = json.loads(tools) if isinstance(tools, str) else tools
    except (ValueError, RecursionError) as error:
        raise DataError(f"{row.where}: tools is not JSON: {error}") from None
    if parsed is None:
        return None
    if not isinstance(parsed, list) or not all(isinstance(tool, dict) for tool in parsed):
        raise DataError(f"{row.where}: tools must be a list of objects, this is {parsed!r:.60}")
    return [tool if "function" in tool else {"type": "function", "function": tool} for tool in parsed]


def _variables(row: Row) -> dict[str, Any]:
    """The variables of the chat template that a row sets: an object, or its JSON; nulls set nothing."""
    given = row.values.get(NAME)
    if given in (None, "", {}):
        return {}
    try:
        parsed = json.loads(given) if isinstance(given, str) else given
    except (ValueError, RecursionError):
        parsed = given
    why = refusal(parsed)
    if why is not None:
        raise DataError(f"{row.where}: {NAME}: {why}. data.ignore_keys=[{NAME}] leaves it out")
    return {name: value for name, value in parsed.items() if value is not None}

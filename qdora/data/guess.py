"""The columns that most likely hold what is wanted, of a row whose keys are not known.

By their names (question, response, context, ...), else in order; also within others (`answers.text`), and in turns.
"""

import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from qdora.config import DataFormat
from qdora.config.commands import written
from qdora.data.sources import Row, is_turns

HARMLESS = frozenset(
    [
        "id",
        "_id",
        "idx",
        "index",
        "uid",
        "uuid",
        "row_id",
        "prompt_id",
        "conversation_id",
        "conversation_hash",
        "message_id",
        "parent_id",
        "source",
        "dataset",
        "origin",
        "url",
        "lang",
        "language",
        "category",
        "task",
        "topic",
        "domain",
        "license",
        "author",
        "model",
        "model_name",
        "timestamp",
        "date",
        "created_at",
        "meta",
        "metadata",
        "tag",
        "tags",
        "split",
        "difficulty",
        "score",
        "quality",
        "token_count",
        "num_tokens",
        "num_turns",
        "answer",
    ]
)
"""Keys that say where a row comes from or what kind it is; `answer` is what an evaluation compares with."""

ROLES = {
    "human": "user",
    "gpt": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "function": "tool",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
}
"""Words for roles, in the turns of a row, by those of chat templates."""
ABSENT: Any = object()
_WORDS_OF_TURNS = {
    "role": ("role", "from", "speaker", "author", "sender", "participant", "party", "user", "name"),
    "content": ("content", "value", "text", "utterance", "message", "body", "sentence", "say", "said"),
}
_WORDS_OF_ROLES = {
    "user": ("user", "human", "customer", "client", "person", "patient", "caller", "prompter", "question"),
    "assistant": ("assistant", "bot", "chatbot", "agent", "gpt", "chatgpt", "ai", "model", "doctor", "answer"),
}
_QUESTION = ("question", "query", "input", "user", "human", "problem", "request")
_ANSWER = ("answer", "response", "reply", "assistant", "solution", "target", "result")
_WORDS = {
    "messages": ("conversation", "dialog", "dialogue", "chat", "turns"),
    "instruction": ("prompt", *_QUESTION),
    "input": ("context", "passage", "background", "document"),
    "output": ("completion", *_ANSWER),
    "system": ("systemprompt", "systemmessage"),
    "prompt": ("instruction", *_QUESTION),
    "completion": (*_ANSWER, "output"),
    "text": ("content", "body", "document", "article", "story", "code"),
}
"""Names under which people have what a key holds, the likeliest first; without case and punctuation."""


def value_at(values: Any, path: str) -> Any:
    """Returns what a column of a row holds, or what others hold by dots (`answers.text`); `ABSENT` where none does.

    Of a list of objects that is a list; a number takes one of its elements. A null, which parquet has for an object
    that a row lacks, holds nulls.
    """
    if path in values:
        return values[path]
    value = values
    for part in path.split("."):
        value = None if value is None else _within(value, part)
    return value


def _within(value: Any, part: str) -> Any:
    if isinstance(value, dict):
        return value.get(part, ABSENT)
    if isinstance(value, list) and part.isdecimal():
        return value[int(part)] if int(part) < len(value) else ABSENT
    if isinstance(value, list):
        inner = [one for each in value if (one := _within(each, part)) is not ABSENT]
        return inner if inner or not value else ABSENT
    return ABSENT


def leaves(values: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Returns what a row holds, by dots what its objects and lists of objects hold; a list of turns is one thing."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        inner = value
        if isinstance(value, list) and value and isinstance(value[0], dict) and turn_columns(value) is None:
            inner = {name: value_at(value, name) for each in value if isinstance(each, dict) for name in each}
        found |= leaves(inner, f"{before}{key}.") if isinstance(inner, dict) else {f"{before}{key}": value}
    return found


def as_option(columns: dict[str, str]) -> str:
    """`data.columns=...` as a shell takes it; where it expands the braces, the command line understands that, too."""
    plain = all(re.fullmatch(r"[\w.-]+", column) for column in columns.values())
    if plain:
        return f"data.columns={{{','.join(f'{key}:{column}' for key, column in columns.items())}}}"
    return shlex.quote(f"data.columns={written(columns)}")


def proposed(row: Row, form: DataFormat = DataFormat.auto) -> str:
    """The end of a refusal: the option that reads the row, in a format if one is wanted; nothing where none would."""
    columns = propose(row, form)
    return f". For other names: {as_option(columns)}" if columns else ""


def propose(row: Row, form: DataFormat = DataFormat.auto) -> dict[str, str]:
    """The columns that most likely hold what a format needs; nothing where no column can."""
    wanted = [form] if form is not DataFormat.auto else [one for one in DataFormat if one is not form]
    columns = leaves(row.values)
    turns = {key: guess for key, value in row.values.items() if (guess := turn_columns(value)) is not None}
    texts = [key for key, value in columns.items() if isinstance(value, str) or ("." in key and _is_texts(value))]
    for one in wanted:
        if one is DataFormat.messages:
            found = _filled(("messages",), (), [*turns])
            found |= turns[found["messages"]] if found else {}
        elif one is DataFormat.instruction:
            found = _filled(("instruction", "output"), ("input", "system"), texts)
            if form is DataFormat.auto and not {"input", "system"} & found.keys() and "instruction" not in texts:
                continue  # nothing that a prompt and its completion would lose
        else:
            needed = ("prompt", "completion") if one is DataFormat.completion else ("text",)
            found = _filled(needed, (), texts)
        if found:
            return {key: column for key, column in found.items() if key != column}
    return {}


def turn_columns(value: Any) -> dict[str, str] | None:
    """Returns the part of `data.columns` that most likely reads a list as turns; empty where they are qdora's own.

    None where the list is of no turns, as far as can be guessed: who speaks, what, and in which words.
    """
    if not isinstance(value, list) or not value or not all(isinstance(turn, dict) for turn in value):
        return None
    ours, first = is_turns(value), value[0]
    texts = [key for key in first if all(isinstance(turn.get(key), str) for turn in value)]
    found: dict[str, str] = {"role": "role" if first.get("role") else "from"} if ours else {}
    if ours and {"content", "value", "tool_calls"} & first.keys():
        found["content"] = "content"
    for key in sorted(_WORDS_OF_TURNS.keys() - found.keys(), reverse=True):
        free = [one for one in texts if one not in found.values()]
        found[key] = next((one for word in _WORDS_OF_TURNS[key] for one in free if _is_named(one, word)), "")
    if not all(found.values()):
        return None
    roles = _role_words([turn.get(found["role"]) or turn.get("from") for turn in value])
    moved = {key: column for key, column in found.items() if column not in (key, "from", "value")}
    return None if roles is None else moved | roles


def _role_words(spoken: Sequence[Any]) -> dict[str, str] | None:
    """Returns the words for roles that are not qdora's; None where nobody can tell which is the assistant's."""
    if not all(isinstance(word, str) for word in spoken):
        return None
    unknown = [word for word in dict.fromkeys(spoken) if word not in ROLES]
    if not unknown:
        return {}
    known = {ROLES[word] for word in spoken if word in ROLES}
    found = {}
    for role, words in _WORDS_OF_ROLES.items():
        named = [word for word in unknown if any(_is_named(word, one) for one in words)]
        if named and role not in known:
            found[role] = named[0]
    speakers = [role for role in ("user", "assistant") if role not in known and role not in found]
    free = [word for word in unknown if word not in found.values()]
    found |= dict(zip(speakers, free, strict=False))  # the user speaks first
    return found if {*found.values()} == {*unknown} else None


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(one, str) for one in value)


def _filled(needed: Sequence[str], optional: Sequence[str], columns: list[str]) -> dict[str, str]:
    """A column for each needed key, and for optional ones whose name says it; nothing where a needed one has none."""
    found: dict[str, str] = {}
    free = dict.fromkeys(columns)

    def take(key: str, column: str | None) -> None:
        if column is not None and key not in found:
            found[key] = column
            del free[column]

    for key in (*needed, *optional):
        take(key, key if key in free else None)
    for by_name in (_is_named, _names):
        for key in (*needed, *optional):
            take(key, next((column for word in _WORDS[key] for column in free if by_name(column, word)), None))
    for key in needed:
        others = (column for column in free if column not in HARMLESS and not _is_known(column))
        take(key, next(others, None) if key not in found else None)
    return found if found.keys() >= {*needed} else {}


def _is_known(column: str) -> bool:
    """Whether a column has the name of what some key holds: an answer is no question, whatever else is missing."""
    return any(_is_named(column, word) for key, words in _WORDS.items() for word in (key, *words))


def _is_named(column: str, word: str) -> bool:
    return re.sub(r"[\W_]", "", column.lower()) == word


def _names(column: str, word: str) -> bool:
    words = re.findall(r"[a-z]+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", column).lower().replace("_", " "))
    return word in words or f"{word}s" in words

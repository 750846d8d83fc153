"""Which keys of a row are read as what: by their names, or by `data.columns` where a file has others.

Rows are read here, so that every reader sees them under the same keys. Of a row whose keys are not known, the columns
that most likely hold what is wanted are proposed: by their names (question, response, context, ...), else in order.
"""

import re
import shlex
from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path

from qdora.config import DataConfig, DataFormat
from qdora.config.commands import written
from qdora.config.words import ASKED_KEYS, NEEDED_KEYS
from qdora.data.sources import Row, is_turns, load_rows
from qdora.errors import DataError

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

_OPTIONAL = {"input", "system", "history", "tools", "functions", "chat_template_kwargs", *ASKED_KEYS}
"""Keys that some rows of a file may lack."""
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


def form_of(row: Row, keys: Collection[str]) -> DataFormat | None:
    """The first format that has all it needs among some keys of a row."""
    form = next((form for needed, form in NEEDED_KEYS if needed <= {*keys}), None)
    return DataFormat.messages if form is DataFormat.completion and is_conversational(row) else form


def is_conversational(row: Row) -> bool:
    """Whether prompt and completion are lists of turns, as TRL writes them."""
    return isinstance(row.values.get("prompt"), list) and isinstance(row.values.get("completion"), list)


def read_rows(
    config: DataConfig,
    source: str,
    limit: int | None = None,
    without: Collection[Path] = (),
    tell: Callable[[str, str], None] = lambda what, where: None,
) -> Iterator[Row]:
    """The rows of `source` without the keys of `data.ignore_keys`, under the names of `data.columns`.

    Args:
        tell: hears of rows that are read under their own names, with their place.

    Raises:
        DataError: nothing there, a line that cannot be read, or a column of `data.columns` that is not there or whose
            key the row has already.
    """
    columns = config.columns
    loaded = load_rows(source, limit, without, columns)
    rows: Iterator[Row] = (_without(row, config.ignore_keys) for row in loaded)
    for first in islice(rows, 1):
        own_names = source != config.train and not {*columns.values()} & first.values.keys()
        if columns and own_names and form_of(first, first.values):
            tell("has no column of data.columns, and is read by its own names", first.where)
            columns = {}
        rows = chain([first], rows)
    if not columns:
        yield from rows
        return
    unseen, where, names = set(columns.values()), source, set[str]()
    for row in rows:
        unseen -= row.values.keys()
        where, names = row.where, names | row.values.keys()
        yield _renamed(row, columns)
    if unseen and names:
        raise _absent(sorted(unseen)[0], columns, f"no row of {source}, up to {where}, has", names)


def _without(row: Row, keys: Collection[str]) -> Row:
    return Row({key: value for key, value in row.values.items() if key not in keys}, row.where) if keys else row


def _renamed(row: Row, columns: dict[str, str]) -> Row:
    for key, column in columns.items():
        if column not in row.values:
            if key in _OPTIONAL:
                continue
            raise _absent(column, columns, f"{row.where} does not have", row.values)
        if key not in columns.values() and row.values.get(key) not in (None, "", [], {}):
            raise DataError(
                f"{row.where} has {key!r} already, where {as_option(columns)} puts {column!r}: "
                f"data.ignore_keys=[{key}] leaves the former out, or map it to another key, too"
            )
    kept = {key: value for key, value in row.values.items() if key not in columns.values()}
    return Row(kept | {key: row.values[name] for key, name in columns.items() if name in row.values}, row.where)


def _absent(column: str, columns: dict[str, str], who: str, names: Collection[str]) -> DataError:
    return DataError(
        f"{who} the column {column!r} of {as_option(columns)}; there are {sorted(names)}. Name one of these; "
        "data.columns={} takes rows as they are"
    )


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
    turns = [key for key, value in row.values.items() if is_turns(value)]
    texts = [key for key, value in row.values.items() if isinstance(value, str)]
    for one in wanted:
        if one is DataFormat.messages:
            found = _filled(("messages",), (), turns)
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
    return word in re.findall(r"[a-z]+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", column).lower().replace("_", " "))

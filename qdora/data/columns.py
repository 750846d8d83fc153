"""Which keys of a row are read as what: by their names, or by `data.columns` where a file has others.

Rows are read here, so that every reader sees them under the same keys.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from itertools import chain, islice
from pathlib import Path
from typing import Any

from qdora.config import DataConfig, DataFormat
from qdora.config.words import ASKED_KEYS, NEEDED_KEYS, ROLE_WORDS, TURN_KEYS
from qdora.data.guess import ABSENT, as_option, leaves, value_at
from qdora.data.sources import Row, load_rows
from qdora.errors import DataError

_OPTIONAL = {"input", "system", "history", "tools", "functions", "chat_template_kwargs", *ASKED_KEYS}
"""Keys that some rows of a file may lack."""
_OF_TURNS = {"messages", "conversations", "prompt", "completion"}
"""Keys of a row that may hold turns."""
_TEXTS = {"instruction", "input", "output", "system", "prompt", "completion", "text"}
"""Keys of a row that hold one text."""


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
    loaded = load_rows(source, limit, without, lambda values: _mapped(values, columns), config.sample_by)
    rows: Iterator[Row] = (_without(row, config.ignore_keys) for row in loaded)
    for first in islice(rows, 1):
        own_names = source != config.train and not _has_any(first.values, columns)
        if columns and own_names and form_of(first, first.values):
            tell("has no column of data.columns, and is read by its own names", first.where)
            columns = {}
        rows = chain([first], rows)
    if not columns:
        yield from rows
        return
    unseen, where, names = {*_of_rows(columns).values()}, source, dict[str, None]()
    for row in rows:
        unseen = {column for column in unseen if value_at(row.values, column) is ABSENT}
        if unseen:
            where, names = row.where, names | dict.fromkeys(leaves(row.values))
        yield _renamed(row, columns, config.ignore_keys, tell)
    if unseen and names:
        raise _absent(sorted(unseen)[0], columns, f"no row of {source}, up to {where}, has", names)


def _without(row: Row, keys: Collection[str]) -> Row:
    return Row({key: value for key, value in row.values.items() if key not in keys}, row.where) if keys else row


def _of_rows(columns: Mapping[str, str]) -> dict[str, str]:
    """Returns those of `data.columns` that name columns, and no keys of turns."""
    return {key: column for key, column in columns.items() if key not in TURN_KEYS | ROLE_WORDS}


def _mapped(values: dict[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """Returns a row with the keys that `data.columns` gives it beside its own, without a look at what is missing."""
    given = {key: value_at(values, column) for key, column in _of_rows(columns).items()}
    named = values | {key: value for key, value in given.items() if value is not ABSENT}
    return {key: _with_roles(value, columns) if key in _OF_TURNS else value for key, value in named.items()}


def _with_roles(turns: Any, columns: Mapping[str, str]) -> Any:
    """Returns turns with `role` and `content` beside their own keys."""
    if not isinstance(turns, list):
        return turns
    pairs = [(key, columns[key]) for key in TURN_KEYS if key in columns]
    return [
        turn | {key: turn[column] for key, column in pairs if column in turn} if isinstance(turn, dict) else turn
        for turn in turns
    ]


def _has_any(values: Mapping[str, Any], columns: Mapping[str, str]) -> bool:
    """Returns whether a row, or a turn of it, has one of the columns."""
    if any(value_at(values, column) is not ABSENT for column in _of_rows(columns).values()):
        return True
    if not columns.keys() & (TURN_KEYS | ROLE_WORDS):
        return False
    named = {columns[key] for key in TURN_KEYS if key in columns}
    lists = [values[key] for key in _OF_TURNS if isinstance(values.get(key), list)]
    return any(isinstance(turn, dict) and (not named or named & turn.keys()) for turns in lists for turn in turns)


def _renamed(row: Row, columns: dict[str, str], ignored: Collection[str], tell: Callable[[str, str], None]) -> Row:
    own = _of_rows(columns)
    found = {}
    for key, column in own.items():
        value = value_at(row.values, column)
        if value is ABSENT:
            if key in _OPTIONAL:
                continue
            raise _absent(column, columns, f"{row.where} does not have", leaves(row.values))
        is_moved = any(key in (other, other.partition(".")[0]) for other in own.values())
        if not is_moved and row.values.get(key) not in (None, "", [], {}):
            raise DataError(
                f"{row.where} has {key!r} already, where {as_option(columns)} puts {column!r}: "
                f"data.ignore_keys=[{key}] leaves the former out, or map it to another key, too"
            )
        if key in _TEXTS and isinstance(value, list) and all(isinstance(one, str) for one in value):
            if len(value) > 1:
                tell(f"{column} has several values, of which the first is read", row.where)
            value = value[0] if value else ""
        found[key] = value
    values = _beside(row.values, [*own.values()]) | found
    if len(own) < len(columns):
        for key in _OF_TURNS & values.keys():
            if isinstance(values[key], list):
                values[key] = [_renamed_turn(turn, columns, ignored, row.where) for turn in values[key]]
    return Row(values, row.where)


def _beside(values: dict[str, Any], paths: list[str]) -> dict[str, Any]:
    """Returns what a row holds beside some columns, by dots where they lie within others."""
    if not any("." in path for path in paths):
        return {key: value for key, value in values.items() if key not in paths}
    within = {path.partition(".")[0] for path in paths if path not in values}
    read = [*paths, *(".".join(part for part in path.split(".") if not part.isdecimal()) for path in paths)]
    left = {key: value for key, value in values.items() if key not in paths and key not in within}
    inner = leaves({key: value for key, value in values.items() if key in within})
    return left | {
        name: value
        for name, value in inner.items()
        if not any(name == path or name.startswith(f"{path}.") or path.startswith(f"{name}.") for path in read)
    }


def _renamed_turn(turn: Any, columns: dict[str, str], ignored: Collection[str], where: str) -> Any:
    """Returns a turn with `role` and `content` under these names, and the role in the words of qdora."""
    if not isinstance(turn, dict):
        return turn
    moved = {key: columns[key] for key in sorted(TURN_KEYS) if key in columns}
    said = {key: value for key, value in turn.items() if key not in moved.values() and key not in ignored}
    for key, column in moved.items():
        if column in turn:
            if said.get(key) not in (None, "", [], {}):
                raise DataError(
                    f"{where}: a turn has {key!r} already, where {as_option(columns)} puts {column!r}: "
                    f"data.ignore_keys=[{key}] leaves the former out"
                )
            said[key] = turn[column]
        elif key == "role" and "from" not in said and "role" not in said:
            raise _absent(column, columns, f"{where}: a turn does not have", turn)
    words = {columns[word]: word for word in ROLE_WORDS if word in columns}
    name = "role" if "role" in said else "from"
    if isinstance(said.get(name), str):
        said[name] = words.get(said[name], said[name])
    return said


def _absent(column: str, columns: dict[str, str], who: str, names: Collection[str]) -> DataError:
    return DataError(
        f"{who} the column {column!r} of {as_option(columns)}; there are {sorted(names)}. Name one of these; "
        "data.columns={} takes rows as they are"
    )

"""Rows of a data set: jsonl, json, parquet or csv (each also .gz), a folder of them, or a hub id.

A row keeps where it came from, so that an error can say which line of which file to look at.
"""

import gzip
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from datasets.exceptions import DatasetsError

from qdora.errors import DataError

SUFFIXES = (".jsonl", ".json", ".parquet", ".csv")


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a data set and its place in it."""

    values: dict[str, Any]
    where: str
    """File (or hub id) and what is counted in it, then the number: `data/x.jsonl line 7`."""


def data_files(source: str) -> list[Path]:
    """The files that `source` names, sorted; empty where it is a hub id.

    Raises:
        DataError: there is no such file or folder, or nothing in it that can be read.
    """
    path = Path(source).expanduser()
    if path.is_file():
        if not _kind(path):
            raise DataError(f"{source}: qdora reads {', '.join(SUFFIXES)}, each also with .gz")
        return [path]
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file() and _kind(file))
        if not files:
            raise DataError(f"the folder {source} holds no {', '.join(SUFFIXES)} (or .gz of one)")
        return files
    name = source.partition("#")[0].partition(":")[0]
    if source.startswith(("/", ".", "~")) or name.count("/") > 1 or _kind(Path(source)):
        raise DataError(f"no such data file or folder: {source}")
    return []


def fingerprint(source: str) -> str:
    """A hash of the files of `source` and their names; of a hub data set, of what `datasets` has stored of it."""
    digest = hashlib.sha256()
    files = data_files(source)
    for file in files:
        digest.update(f"{file}\0".encode())  # the places of rows have the name, and its suffix tells how to read it
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    if not files:
        digest.update(_from_hub(source)._fingerprint.encode())
    return digest.hexdigest()


def load_rows(source: str, limit: int | None = None) -> Iterator[Row]:
    """The rows of `source`, at most `limit`.

    Raises:
        DataError: nothing there, or a file or line that cannot be read.
    """
    files = data_files(source)
    rows = (row for file in files for row in _file_rows(file)) if files else _hub_rows(source)
    for index, row in enumerate(rows):
        if limit is not None and index >= limit:
            return
        yield row


def _kind(path: Path) -> str:
    suffix = Path(path.name.removesuffix(".gz")).suffix
    return suffix if suffix in SUFFIXES else ""


def _file_rows(file: Path) -> Iterator[Row]:
    kind = _kind(file)
    if kind == ".jsonl":
        yield from _jsonl_rows(file)
    elif kind == ".json":
        yield from _json_rows(file)
    else:
        try:
            loaded = datasets.load_dataset(kind[1:], data_files=str(file), split="train", keep_in_memory=True)
        except (OSError, ValueError, DatasetsError) as error:
            cause = error.__cause__ or error
            raise DataError(f"{file} cannot be read as {kind[1:]}: {cause}") from error
        yield from (Row(values, f"{file} row {index + 1}") for index, values in enumerate(loaded))


def _open(file: Path) -> Any:
    return gzip.open(file, "rb") if file.suffix == ".gz" else file.open("rb")


def _jsonl_rows(file: Path) -> Iterator[Row]:
    with _open(file) as stream:
        try:
            for number, line in enumerate(stream, 1):
                if line.strip():
                    where = f"{file} line {number}"
                    yield Row(_parse(line, where), where)
        except (OSError, EOFError) as error:
            raise DataError(f"{file} cannot be read: {error}") from None


def _json_rows(file: Path) -> Iterator[Row]:
    try:
        with _open(file) as stream:
            content = stream.read()
    except (OSError, EOFError) as error:
        raise DataError(f"{file} cannot be read: {error}") from None
    try:
        loaded = json.loads(content)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{file} is not JSON: {error}") from None
    if isinstance(loaded, dict):
        lists = [value for value in loaded.values() if isinstance(value, list)]
        loaded = lists[0] if len(lists) == 1 else None
    if not isinstance(loaded, list):
        raise DataError(f"{file}: a .json file holds a list of rows; for a row a line use .jsonl")
    for index, values in enumerate(loaded, 1):
        if not isinstance(values, dict):
            raise DataError(f"{file} row {index}: a row is a JSON object with named fields, this is {values!r:.60}")
        yield Row(values, f"{file} row {index}")


def _parse(line: bytes, where: str) -> dict[str, Any]:
    try:
        values = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where} is not JSON: {error.msg} at column {error.colno}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{where} is not UTF-8: {error}") from None
    if not isinstance(values, dict):
        raise DataError(f"{where}: a row is a JSON object with named fields, this is {values!r:.60}")
    return values


def _from_hub(source: str) -> Any:
    name, _, split = source.partition("#")
    name, _, subset = name.partition(":")
    try:
        return datasets.load_dataset(name, subset or None, split=split or "train")
    except (OSError, ValueError, DatasetsError) as error:
        raise DataError(
            f"{source} is neither a file nor a folder here, and as a hub data set (name:subset#split) it failed: "
            f"{str(error).splitlines()[0]}"
        ) from error


def _hub_rows(source: str) -> Iterator[Row]:
    for index, values in enumerate(_from_hub(source)):
        yield Row(values, f"{source} row {index + 1}")

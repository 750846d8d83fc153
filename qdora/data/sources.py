"""Rows of a data set: jsonl, json, parquet, csv, tsv or txt (each also .gz), a folder of them, or a hub id.

A folder that `datasets` has saved is read, too. What begins with a dot, and files about data sets, are passed over; of
several splits (`train.jsonl`, `test.jsonl`) one is to be named. A .json file may hold a row a line, and a .jsonl file a
list.

A row keeps where it came from, so that an error can say which line of which file to look at. Parquet and the hub import
what they need when it is needed, as it takes every rank most of a second.
"""

import codecs
import functools
import hashlib
import json
import re
import zlib
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qdora.config import DataFormat, SampleBy
from qdora.config.words import NEEDED_KEYS
from qdora.data.splits import ALL, of_split
from qdora.data.texts import open_file, open_text, table_rows, text_rows
from qdora.errors import DataError
from qdora.files import read_json

SUFFIXES = (".jsonl", ".json", ".parquet", ".csv", ".tsv")
_TEXT = ".txt"
"""Not read beside files of other kinds, as it is mostly about them."""
_SAVED = ".arrow"
"""A file of a folder that `datasets` has saved."""
_NO_TEXT = re.compile(r"(readme|licen[cs]e|notice|changelog|requirements|robots|citation)\b", re.IGNORECASE)
"""What the name of a .txt begins with that is about others."""
_ABOUT = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
_PARQUET_BATCH = 1000
"""Rows in memory at a time."""
_UNREADABLE = (OSError, EOFError, zlib.error)
"""What a file that is missing, cut or damaged raises, compressed or not."""


Mapped = Callable[[dict[str, Any]], dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a data set and its place in it."""

    values: dict[str, Any]
    where: str
    """File (or hub id) and what is counted in it, then the number: `data/x.jsonl line 7`."""


def data_files(source: str, without: Collection[Path] = ()) -> list[Path]:
    """The files that `source` names, sorted; empty where it is a hub id.

    Args:
        without: files that are not taken from a folder, by whatever name or link.

    Raises:
        DataError: there is no such file or folder, or nothing in it that can be read.
    """
    path = Path(source).expanduser()
    if path.is_file():
        if not _kind(path):
            raise DataError(f"{source}: qdora reads {', '.join((*SUFFIXES, _TEXT))}, each also with .gz")
        return [path]
    folder, split = folder_of(source)
    if folder is not None:
        if (folder / "dataset_dict.json").is_file():
            if (folder / split / "state.json").is_file():
                return _files_of(folder / split, "", without)
            splits = ", ".join(str(one) for one in sorted(folder.iterdir()) if one.is_dir())
            raise DataError(f"{source} is a data set with several splits: name one of them ({splits})")
        return _files_of(folder, split, without)
    if is_missing(source):
        raise DataError(f"no such data file or folder: {source}")
    return []


def is_missing(source: str) -> bool:
    """Returns whether `source` is neither a file nor a folder here, and cannot be a hub id."""
    if Path(source).expanduser().exists() or folder_of(source)[0] is not None:
        return False
    name = source.partition("#")[0].partition(":")[0]
    return source.startswith(("/", ".", "~")) or name.count("/") > 1 or bool(_kind(Path(source)))


def all_files(source: str) -> list[Path]:
    """Returns the files that `source` names, of a folder all, whatever their split; raises as `data_files` does."""
    folder, split = folder_of(source)
    return data_files(source if folder is None or split else f"{folder}#{ALL}")


def folder_of(source: str) -> tuple[Path | None, str]:
    """Returns the folder that `source` names, with or without `#split`, and that split; None where it is no folder."""
    path, (name, _, split) = Path(source).expanduser(), source.rpartition("#")
    if path.is_dir():
        return path, ""
    named = Path(name).expanduser()
    return (named, split) if name and named.is_dir() else (None, "")


def _found_in(folder: Path) -> list[Path]:
    """Returns the files below a folder that can hold rows."""
    files = []
    for file in sorted(folder.rglob("*")):
        is_hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
        is_about = file.name in _ABOUT or (is_text(file) and _NO_TEXT.match(file.name))
        if not is_hidden and _kind(file) not in ("", _SAVED) and not is_about and file.is_file():
            files.append(file)
    return files


def _files_of(folder: Path, split: str, without: Collection[Path]) -> list[Path]:
    saved = read_json(folder / "state.json").get("_data_files", [])
    files = [folder / str(entry.get("filename")) for entry in saved] or _found_in(folder)
    if not files:
        raise DataError(f"the folder {folder} holds no {', '.join((*SUFFIXES, _TEXT))} (or .gz of one)")
    files = [file for file in files if not is_text(file)] or files
    left = [file for file in files if not any(file.samefile(other) for other in without)]
    if not left:
        raise DataError(f"the folder {folder} holds nothing but what data.eval holds out")
    return of_split(folder, left, split)


def passed_over(source: str) -> list[Path]:
    """Returns the .txt files of a folder that are not read, as others lie beside them."""
    folder, _ = folder_of(source)
    if folder is None or (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        return []
    files = _found_in(folder)
    texts = [file for file in files if is_text(file)]
    return texts if len(texts) < len(files) else []


def fingerprint(source: str, without: Collection[Path] = ()) -> str:
    """A hash of the files of `source` and their names; of a hub data set, of what `datasets` has stored of it.

    Raises:
        DataError: nothing there, or a file that cannot be read.
    """
    digest = hashlib.sha256()
    files = data_files(source, without)
    for file in files:
        digest.update(f"{file}\0".encode())  # the places of rows have the name, and its suffix tells how to read it
        digest.update(_digest(file))
    if not files:
        digest.update(_from_hub(source)._fingerprint.encode())
    return digest.hexdigest()


def content(source: str) -> str | None:
    """A hash of what is in the files of `source`, wherever they lie; None of a hub data set, which says itself.

    Raises:
        DataError: nothing there, or a file that cannot be read.
    """
    digests = [_digest(file) for file in all_files(source)]
    return hashlib.sha256(b"".join(digests)).hexdigest()[:24] if digests else None


def _digest(file: Path) -> bytes:
    """Returns a hash of the bytes of a file, which are read once as long as it is not written to."""
    try:
        state = file.stat()
        return _digest_of(file, state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns)
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error}") from None


@functools.cache
def _digest_of(file: Path, *_: int) -> bytes:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").digest()


def load_rows(
    source: str,
    limit: int | None = None,
    without: Collection[Path] = (),
    mapped: Mapped = lambda values: values,
    sample_by: SampleBy = SampleBy.document,
) -> Iterator[Row]:
    """Yields the rows of `source` as they are, at most `limit`; of a folder without some of its files.

    Args:
        mapped: makes what `data.columns` says of the keys of a row, to know one by that is alone in a .json file.
        sample_by: what of a .txt is a row.

    Raises:
        DataError: nothing there, or a file or line that cannot be read.
    """
    files = data_files(source, without)
    rows = (row for file in files for row in _file_rows(file, mapped, sample_by)) if files else _hub_rows(source)
    for index, row in enumerate(rows):
        if limit is not None and index >= limit:
            return
        yield row


def _kind(path: Path) -> str:
    suffix = Path(path.name.removesuffix(".gz")).suffix
    return suffix if suffix in (*SUFFIXES, _TEXT, _SAVED) else ""


def is_text(file: Path) -> bool:
    """Returns whether a file is plain text (.txt)."""
    return _kind(file) == _TEXT


def _file_rows(file: Path, mapped: Mapped, sample_by: SampleBy) -> Iterator[Row]:
    kind = _kind(file)
    readers = {".parquet": _parquet_rows, _SAVED: _saved_rows}
    try:
        if kind in (".csv", ".tsv", _TEXT):
            delimiter = "," if kind == ".csv" else "\t"
            rows = text_rows(file, sample_by) if kind == _TEXT else table_rows(file, delimiter)
            yield from (Row(values, where) for values, where in rows)
            return
        if _is_a_list(file, kind):
            yield from _list_rows(file, mapped)
        else:
            yield from readers.get(kind, _jsonl_rows)(file)
    except _UNREADABLE as error:
        raise DataError(f"{file} cannot be read: {error}") from None


def _is_a_list(file: Path, kind: str) -> bool:
    """Whether JSON is one value, not a row a line, by its beginning."""
    if kind not in (".json", ".jsonl"):
        return False
    with open_text(file) as stream:
        lines = (line for line in stream if line.strip())
        first, is_alone = next(lines, b""), next(lines, None) is None
    if kind == ".json" and is_alone:
        return True  # a list, an object that holds one, or a row
    begins = first.removeprefix(codecs.BOM_UTF8).lstrip()[:1]
    return begins == b"[" or (kind == ".json" and not _is_json(first))


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def is_turns(value: Any) -> bool:
    """Returns whether a value is a list of turns, by the first of them."""
    first = value[0] if isinstance(value, list) and value else None
    return isinstance(first, dict) and bool({"role", "from"} & first.keys())


def _is_row(values: dict[str, Any]) -> bool:
    """Returns whether an object has the keys of a row, and is not one that holds a list of rows."""
    for needed, form in NEEDED_KEYS:
        is_one = form is not DataFormat.messages or all(is_turns(values.get(key)) for key in needed)
        if is_one and needed <= values.keys():
            return True
    return False


def _holds_objects(values: list[Any]) -> bool:
    return bool(values) and isinstance(values[0], dict)


def _jsonl_rows(file: Path) -> Iterator[Row]:
    with open_text(file) as stream:
        for number, line in enumerate(stream, 1):
            if line.strip():
                where = f"{file} line {number}"
                yield Row(_parse(line, where), where)


def _parquet_rows(file: Path) -> Iterator[Row]:
    import datasets
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    number = 0
    with open_file(file) as stream:
        try:
            parquet = pq.ParquetFile(stream)
            for batch in parquet.iter_batches(_PARQUET_BATCH):
                # Through `datasets`, which undoes what it did to columns when it wrote the file (JSON, for one).
                for values in datasets.Dataset(pa.Table.from_batches([batch], parquet.schema_arrow)):
                    number += 1
                    yield Row(_unpadded(values), f"{file} row {number}")
        except (pa.ArrowException, UnicodeDecodeError) as error:
            raise DataError(f"{file} cannot be read as parquet: {error}") from None


def _list_rows(file: Path, mapped: Mapped) -> Iterator[Row]:
    with open_text(file) as stream:
        content = stream.read()
    try:
        loaded = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file} is not JSON: {error}") from None
    if isinstance(loaded, dict):
        objects = [value for value in loaded.values() if isinstance(value, list) and _holds_objects(value)]
        if _is_row(mapped(loaded)) or not objects or is_turns(objects[0]):
            loaded = [loaded]
        else:
            loaded = objects[0] if len(objects) == 1 else None
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
        raise DataError(f"{where} is not UTF-8: {error}. Save it as UTF-8 (iconv converts it)") from None
    except (ValueError, RecursionError) as error:  # digits, or brackets, without end
        raise DataError(f"{where} cannot be read: {error}") from None
    if not isinstance(values, dict):
        raise DataError(f"{where}: a row is a JSON object with named fields, this is {values!r:.60}")
    return values


def _saved_rows(file: Path) -> Iterator[Row]:
    import datasets

    for index, values in enumerate(datasets.Dataset.from_file(str(file)), 1):
        yield Row(_unpadded(values), f"{file} row {index}")


def _from_hub(source: str) -> Any:
    import datasets
    from datasets.exceptions import DatasetsError

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
        yield Row(_unpadded(values), f"{source} row {index + 1}")


def _unpadded(value: Any) -> Any:
    """Without the nulls of what is nested: a column of structs has each key in each of its rows."""
    if isinstance(value, dict):
        return {key: _unpadded(own) for key, own in value.items() if own is not None}
    return [_unpadded(own) for own in value] if isinstance(value, list) else value

"""Files of text: their encodings, tables (csv, tsv) and plain text (txt).

The cells of a table are texts, whatever they look like; an empty or missing one is an empty text. Texts are UTF-8, with
or without a byte order mark, or UTF-16 or 32 by their first bytes, as spreadsheets and Windows write them.
"""

import csv
import gzip
import io
import json
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

from qdora.config import SampleBy
from qdora.errors import DataError

csv.field_size_limit(2**31 - 1)  # Python's own limit of 131,072 characters is less than a long document


def open_file(file: Path) -> Any:
    """Returns the bytes of a file, of a compressed one what is in it."""
    return gzip.open(file, "rb") if file.suffix == ".gz" else file.open("rb")


def open_text(file: Path) -> Any:
    """The bytes of a text as UTF-8; one in UTF-16 or 32, by its first bytes, is converted in memory.

    Raises:
        DataError: it is not what they say.
    """
    stream = open_file(file)
    encoding = json.detect_encoding(stream.peek(4)[:4])
    if encoding.startswith("utf-8"):
        return stream
    with stream:
        try:
            return io.BytesIO(stream.read().decode(encoding).encode())
        except UnicodeDecodeError as error:
            raise DataError(f"{file} begins as {encoding} and is something else: {error}. Save it as UTF-8") from None


def table_rows(file: Path, delimiter: str) -> Iterator[tuple[dict[str, str], str]]:
    """Yields the rows of a csv or tsv and their places.

    Raises:
        DataError: a line that cannot be read.
    """
    kind = "csv" if delimiter == "," else "tsv"
    with open_text(file) as stream:
        reader = csv.reader(io.TextIOWrapper(stream, "utf-8-sig", newline=""), strict=True, delimiter=delimiter)
        try:
            keys = next(reader, [])
            number = reader.line_num + 1
            for cells in reader:
                where, number = f"{file} line {number}", reader.line_num + 1
                if len(cells) > len(keys):
                    raise DataError(f"{where} has {len(cells)} cells, but the first line names {len(keys)} columns")
                if cells:
                    yield dict(zip_longest(keys, cells, fillvalue="")), where
        except csv.Error as error:
            raise DataError(
                f"{file} line {reader.line_num} is not {kind}: {error}. A cell that begins with a quote ends with one, "
                "and quotes within it are doubled"
            ) from None
        except UnicodeDecodeError as error:
            raise DataError(f"{file} is not UTF-8: {error}. Save it as UTF-8 (iconv converts it)") from None


def text_rows(file: Path, by: SampleBy) -> Iterator[tuple[dict[str, str], str]]:
    """Yields the texts of a .txt, by `data.sample_by`, with the places of their first lines; blank ones are none.

    Raises:
        DataError: it is no text.
    """
    with open_text(file) as stream:
        lines = io.TextIOWrapper(stream, "utf-8-sig")
        kept: list[str] = []
        first = 1
        try:
            for number, line in enumerate(lines, 1):
                is_end = by is SampleBy.line or (by is SampleBy.paragraph and not line.strip())
                if not kept:
                    first = number
                kept.append(line)
                if is_end:
                    yield from _text(kept, by, f"{file} line {first}")
                    kept = []
        except UnicodeDecodeError as error:
            raise DataError(f"{file} is not UTF-8: {error}. Save it as UTF-8 (iconv converts it)") from None
        yield from _text(kept, by, f"{file} line {first}")


def _text(lines: list[str], by: SampleBy, where: str) -> Iterator[tuple[dict[str, str], str]]:
    text = "".join(lines)
    if text.strip():
        yield {"text": text if by is SampleBy.document else text.strip("\n")}, where

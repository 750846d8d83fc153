"""Every kind of source gives its rows, and every mistake in one is told with its place."""

import gzip
import json
from pathlib import Path

import datasets
import pytest

from qdora.data.sources import fingerprint, load_rows
from qdora.errors import DataError

ROWS = [{"prompt": f"question {n}", "completion": f"antwört {n}"} for n in range(5)]


def write(file: Path, text: str) -> Path:
    """`text` in UTF-8, compressed where the name says so."""
    content = text.encode()
    file.write_bytes(gzip.compress(content) if file.suffix == ".gz" else content)
    return file


def _jsonl(rows: list[dict[str, str]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def _values(source: Path) -> list[dict[str, str]]:
    return [row.values for row in load_rows(str(source))]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_jsonl_gives_its_rows(tmp_path: Path, name: str) -> None:
    assert _values(write(tmp_path / name, _jsonl(ROWS) + "\n")) == ROWS


@pytest.mark.parametrize("name", ["a.json", "a.json.gz"])
@pytest.mark.parametrize("content", [ROWS, {"data": ROWS, "version": 1}])
def test_json_gives_its_rows(tmp_path: Path, name: str, content: object) -> None:
    assert _values(write(tmp_path / name, json.dumps(content))) == ROWS


@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz"])
def test_csv_gives_its_rows(tmp_path: Path, name: str) -> None:
    lines = ["prompt,completion", *(f"{row['prompt']},{row['completion']}" for row in ROWS)]
    assert _values(write(tmp_path / name, "\n".join(lines) + "\n")) == ROWS


def test_parquet_gives_its_rows(tmp_path: Path) -> None:
    datasets.Dataset.from_list(ROWS).to_parquet(tmp_path / "a.parquet")
    assert _values(tmp_path / "a.parquet") == ROWS


def test_folder_gives_the_rows_of_its_files_in_order(tmp_path: Path) -> None:
    write(tmp_path / "b.json", json.dumps(ROWS[3:]))
    write(tmp_path / "a.jsonl.gz", _jsonl(ROWS[:3]))
    write(tmp_path / "README.md", "not data")
    assert _values(tmp_path) == ROWS


def test_limit_ends_the_rows(tmp_path: Path) -> None:
    assert len(list(load_rows(str(write(tmp_path / "a.jsonl", _jsonl(ROWS))), limit=2))) == 2


def test_fingerprint_follows_the_content(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", _jsonl(ROWS))
    before = fingerprint(str(file))
    assert fingerprint(str(file)) == before
    write(file, _jsonl(ROWS[:4]))
    assert fingerprint(str(file)) != before


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "a"}\n{"text": \n', "a.jsonl line 2 is not JSON"),
        ("a.jsonl", '{"text": "a"}\n["b"]\n', "a.jsonl line 2: a row is a JSON object"),
        ("a.json", '{"text": "a"', "a.json is not JSON"),
        ("a.json", '{"text": "a"}', "use .jsonl"),
        ("a.json", '["a"]', "a.json row 1: a row is a JSON object"),
        ("a.parquet", "not parquet", "cannot be read as parquet"),
        ("a.txt", "words", "qdora reads .jsonl"),
    ],
)
def test_broken_source_is_told_with_its_place(tmp_path: Path, name: str, content: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        list(load_rows(str(write(tmp_path / name, content))))


def test_truncated_gzip_is_told(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl.gz", _jsonl(ROWS * 100))
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(DataError, match="cannot be read"):
        list(load_rows(str(file)))


def test_bytes_that_are_not_utf8_are_told(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "\xff"}\n')
    with pytest.raises(DataError, match="line 1 is not UTF-8"):
        list(load_rows(str(tmp_path / "a.jsonl")))


@pytest.mark.parametrize("source", ["missing.jsonl", "/missing/folder", "./missing", "a/b/c"])
def test_missing_file_is_told(source: str) -> None:
    with pytest.raises(DataError, match="no such data file or folder"):
        list(load_rows(source))


def test_folder_without_data_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no"):
        list(load_rows(str(tmp_path)))


def test_unreachable_hub_data_is_told_both_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="neither a file nor a folder here"):
        list(load_rows("nobody/nothing#train"))

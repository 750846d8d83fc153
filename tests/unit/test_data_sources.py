"""Every kind of source gives its rows, and every mistake in one is told with its place."""

import gzip
import io
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import datasets
import pytest

from qdora.config import DataConfig, SampleBy
from qdora.data.dataset import prepare
from qdora.data.sources import SUFFIXES, fingerprint, load_rows
from qdora.data.splits import split_of
from qdora.errors import DataError
from tests.support.models import make_tokenizer

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


@pytest.mark.parametrize("name", ["a.tsv", "a.tsv.gz"])
def test_tsv_gives_its_rows(tmp_path: Path, name: str) -> None:
    """Commas are of the text."""
    rows = [*ROWS, {"prompt": "one, two", "completion": 'three\t"four"'}]
    lines = ["prompt\tcompletion", *(f"{row['prompt']}\t{row['completion']}" for row in ROWS)]
    lines.append('one, two\t"three\t""four"""')
    assert _values(write(tmp_path / name, "\n".join(lines) + "\n")) == rows


TEXT = 'Once,\nupon a time.\n\n\n"The end", said Ada.\n'


@pytest.mark.parametrize(
    ("by", "texts", "lines"),
    [
        (SampleBy.document, [TEXT], [1]),
        (SampleBy.paragraph, ["Once,\nupon a time.", '"The end", said Ada.'], [1, 5]),
        (SampleBy.line, ["Once,", "upon a time.", '"The end", said Ada.'], [1, 2, 5]),
    ],
)
@pytest.mark.parametrize(
    ("name", "encoding", "newline"),
    [("a.txt", "utf-8", "\n"), ("a*(1).txt", "utf-8-sig", "\r\n"), ("b.txt.gz", "utf-16", "\n")],
)
def test_txt_gives_its_texts(
    tmp_path: Path, by: SampleBy, texts: list[str], lines: list[int], name: str, encoding: str, newline: str
) -> None:
    content = TEXT.replace("\n", newline).encode(encoding)
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    rows = list(load_rows(str(tmp_path / name), sample_by=by))
    assert [row.values for row in rows] == [{"text": text} for text in texts]
    assert [row.where for row in rows] == [f"{tmp_path / name} line {line}" for line in lines]


def test_txt_files_of_a_folder_are_a_text_each_and_that_is_told(tmp_path: Path) -> None:
    """With the option that reads it otherwise, which does; what is only about the others is not read."""
    folder = tmp_path / "books"
    folder.mkdir()
    for name in ("1.txt", "2.txt", "README.txt"):
        write(folder / name, TEXT)
    write(folder / "empty.txt", " \n")
    config = DataConfig(train=str(folder), cache_dir=str(tmp_path / "cache"), max_length=16)
    report = prepare(config, str(folder), make_tokenizer()).report
    assert (report.format, report.num_rows, report.num_split) == ("text", 2, 2)
    assert report.notes[0] == (
        f"is one text; data.sample_by=line or paragraph reads each as one (3 times, first in {folder}/1.txt)"
    )
    config = replace(config, sample_by=SampleBy.line)
    report = prepare(config, str(folder), make_tokenizer()).report
    assert report.num_rows == 6
    assert not any("sample_by" in note for note in report.notes)


def test_text_beside_other_files_is_not_read_and_told(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    rows = [{"text": "a"}, {"text": "b"}]
    write(folder / "a.jsonl", _jsonl(rows))
    for name in ("notes.txt", "LICENSE.txt"):
        write(folder / name, TEXT)
    config = DataConfig(train=str(folder), cache_dir=str(tmp_path / "cache"))
    report = prepare(config, str(folder), make_tokenizer()).report
    assert report.num_rows == len(rows)
    file = folder / "notes.txt"
    assert report.notes == [
        f"is not read beside files of other kinds, only where it is named itself (1 time, first in {file})"
    ]
    assert prepare(replace(config, train=str(file)), str(file), make_tokenizer()).report.num_rows == 1


def test_rows_of_several_formats_are_told_with_the_place_of_each(tmp_path: Path) -> None:
    """A file of one of them, as the message says, is read."""
    folder = tmp_path / "data"
    folder.mkdir()
    write(folder / "a.jsonl", _jsonl(ROWS))
    write(folder / "b.csv", "instruction,output\na,b\n")
    write(folder / "c.jsonl", '{"text": "a"}\n')
    config = DataConfig(train=str(folder), cache_dir=str(tmp_path / "cache"))
    places = f"completion: {folder}/a.jsonl line 1, instruction: {folder}/b.csv line 2, text: {folder}/c.jsonl line 1"
    with pytest.raises(DataError, match=re.escape(f"several formats ({places}), and a run reads one")):
        prepare(config, str(folder), make_tokenizer())
    one = str(folder / "b.csv")
    assert prepare(replace(config, train=one), one, make_tokenizer()).report.format == "instruction"


def test_row_of_no_format_is_told_with_the_row_that_says_the_format(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    write(folder / "a.jsonl", _jsonl([{"messages": turns}]))
    write(folder / "b.csv", "question,answer\na,b\n")
    config = DataConfig(train=str(folder), cache_dir=str(tmp_path / "cache"))
    told = f"{folder}/b.csv line 2 has no messages, .* The format is that of the first row, {folder}/a.jsonl line 1"
    with pytest.raises(DataError, match=told):
        prepare(config, str(folder), make_tokenizer())


def test_rows_of_one_format_by_mapped_names_are_not_told_as_several(tmp_path: Path) -> None:
    """They have the keys of another one beside, and what is wrong is told."""
    rows = [{"prompt": "a", "completion": "b", "words": "c"}, {"prompt": "a", "completion": "b", "words": 1}]
    file = str(write(tmp_path / "a.jsonl", _jsonl(rows)))
    config = DataConfig(train=file, columns={"text": "words"}, cache_dir=str(tmp_path / "cache"))
    with pytest.raises(DataError, match="line 2: text must be a text"):
        prepare(config, file, make_tokenizer())


def test_csv_cells_are_texts(tmp_path: Path) -> None:
    """Numbers, words that pandas takes for nothing, a comma and a line break; the last two have no answer."""
    text = 'prompt,completion\n1+1,2\n"a, b",NA\n"c\nd",007\n\nnothing,\nshort\n'
    rows = list(load_rows(str(write(tmp_path / "a.csv", "\ufeff" + text))))
    assert [(row.values["prompt"], row.values["completion"]) for row in rows] == [
        ("1+1", "2"),
        ("a, b", "NA"),
        ("c\nd", "007"),
        ("nothing", ""),
        ("short", ""),
    ]
    assert [row.where.rpartition(" ")[2] for row in rows] == ["2", "3", "4", "7", "8"]


def test_csv_cell_may_be_long(tmp_path: Path) -> None:
    assert _values(write(tmp_path / "a.csv", "text\n" + "x" * 200_000 + "\n")) == [{"text": "x" * 200_000}]


@pytest.mark.parametrize("name", ["a.parquet", "a.parquet.gz"])
def test_parquet_gives_its_rows(tmp_path: Path, name: str) -> None:
    rows = [{"text": str(n), "messages": [{"role": "user", "content": "a"}] * (n % 3)} for n in range(2500)]
    content = io.BytesIO()
    datasets.Dataset.from_list(rows).to_parquet(content, batch_size=700)
    (tmp_path / name).write_bytes(gzip.compress(content.getvalue()) if name.endswith(".gz") else content.getvalue())
    found = list(load_rows(str(tmp_path / name)))
    assert [row.values for row in found] == rows
    assert found[2400].where.endswith(f"{name} row 2401")


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
        ("a.json", '{"train": [{"text": "a"}], "test": [{"text": "b"}]}', "use .jsonl"),
        ("a.json", '["a"]', "a.json row 1: a row is a JSON object"),
        ("a.parquet", "not parquet", "a.parquet cannot be read as parquet"),
        ("a.parquet.gz", "not parquet", "a.parquet.gz cannot be read as parquet"),
        ("a.csv", "text\na\nb,c\n", "a.csv line 3 has 2 cells, but the first line names 1 columns"),
        ("a.csv", 'text\na\n"b\n', "a.csv line 3 is not csv"),
        ("a.tsv", 'text\na\n"b\n', "a.tsv line 3 is not tsv"),
        ("a.tsv", 'text\n"a" b\n', "a.tsv line 2 is not tsv.* quotes within it are doubled"),
        ("a.md", "words", "qdora reads .jsonl"),
    ],
)
def test_broken_source_is_told_with_its_place(tmp_path: Path, name: str, content: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        list(load_rows(str(write(tmp_path / name, content))))


def _damaged(content: bytes) -> bytes:
    """Bits of the compressed data turned over; header and length stay."""
    middle = len(content) // 2
    return content[:middle] + bytes(byte ^ 0xFF for byte in content[middle : middle + 40]) + content[middle + 40 :]


@pytest.mark.parametrize("damage", [lambda content: content[:-20], _damaged, lambda _: b"no gzip"])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_broken_gzip_is_told(tmp_path: Path, suffix: str, damage: Callable[[bytes], bytes]) -> None:
    plain = tmp_path / f"a{suffix}"
    if suffix == ".parquet":
        datasets.Dataset.from_list(ROWS * 100).to_parquet(plain)
    else:
        plain.write_text("prompt\n" + "\n".join(str(n * n) for n in range(9999)) if suffix == ".csv" else _jsonl(ROWS))
    file = tmp_path / f"b{suffix}.gz"
    file.write_bytes(damage(gzip.compress(plain.read_bytes())))
    with pytest.raises(DataError, match=rf"b{suffix}.gz cannot be read"):
        list(load_rows(str(file)))


def test_unreadable_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").symlink_to("/proc/self/mem")  # opens, but cannot be read, even by root
    for read in (fingerprint, lambda source: list(load_rows(source))):
        with pytest.raises(DataError, match=r"a\.jsonl cannot be read"):
            read(str(tmp_path / "a.jsonl"))


@pytest.mark.parametrize(("name", "place"), [("a.jsonl", " line 1"), ("a.json", ""), ("a.csv", "")])
def test_bytes_that_are_not_utf8_are_told(tmp_path: Path, name: str, place: str) -> None:
    (tmp_path / name).write_bytes(b'{"text": "\xff"}\n')
    with pytest.raises(DataError, match=rf"{name}{place} is not (UTF-8|JSON)"):
        list(load_rows(str(tmp_path / name)))


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


def test_example_data_is_what_its_readme_says(root: Path) -> None:
    """144 and 16 rows, no question in both, an `answer` that the right output contains, names replaced."""
    train, test = (
        [json.loads(line) for line in (root / "data" / f"identity_{name}.jsonl").read_text().splitlines()]
        for name in ("train", "test")
    )
    assert (len(train), len(test)) == (144, 16)
    questions = [{" ".join(row["instruction"].casefold().split()) for row in rows} for rows in (train, test)]
    assert questions[0].isdisjoint(questions[1])
    assert all(row["answer"] and row["answer"] in row["output"] for row in test)
    assert not [row for row in train + test if re.search(r"Vicuna|LMSYS|\{\{", row["output"], re.IGNORECASE)]


def named_files(folder: Path, *names: str) -> str:
    """Makes a file of one row, which has the file's name, for each name."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps({"text": name}) + "\n", encoding="utf-8")
    return str(folder)


@pytest.mark.parametrize(
    ("names", "split", "expected"),
    [
        (["data/train-00000-of-00001.jsonl", "data/test-00000-of-00001.jsonl"], "train", 1),
        (["a.jsonl", "b.jsonl", "dev.jsonl"], "train", 2),
        (["train/a.jsonl", "validation/a.jsonl", "test/a.jsonl"], "validation", 1),
        (["my_eval_set.jsonl", "latest.jsonl"], "test", 1),
        (["a.jsonl", "dev.jsonl"], "all", 2),
    ],
)
def test_folder_with_files_of_several_splits_wants_one(
    names: list[str], split: str, expected: int, tmp_path: Path
) -> None:
    folder = named_files(tmp_path / "data", *names)
    with pytest.raises(DataError, match="several splits by their names") as refused:
        [*load_rows(folder)]
    assert f"{folder}#{split}" in str(refused.value)
    texts = [row.values["text"] for row in load_rows(f"{folder}#{split}")]
    assert len(texts) == expected
    assert {split_of(Path(text)) for text in texts} == {split} or split == "all"


@pytest.mark.parametrize("names", [["test.jsonl", "eval-2.jsonl"], ["train.jsonl", "other.jsonl"], ["latest.jsonl"]])
def test_folder_of_one_split_needs_no_name(names: list[str], tmp_path: Path) -> None:
    assert len([*load_rows(named_files(tmp_path / "data", *names))]) == len(names)


def test_split_that_a_folder_has_not_is_told(tmp_path: Path) -> None:
    folder = named_files(tmp_path / "data", "a.jsonl", "test.jsonl")
    with pytest.raises(DataError, match=rf"no file of that split .*give one of {folder}#train, {folder}#test"):
        [*load_rows(f"{folder}#validation")]


def test_split_of_a_saved_data_set_is_named_as_one_of_a_folder(tmp_path: Path) -> None:
    splits = datasets.DatasetDict({name: datasets.Dataset.from_list([{"text": name}]) for name in ("test", "train")})
    splits.save_to_disk(tmp_path / "saved")
    assert [row.values["text"] for row in load_rows(f"{tmp_path / 'saved'}#test")] == ["test"]


def test_splits_of_a_folder_are_held_out_by_name(tmp_path: Path) -> None:
    folder = named_files(tmp_path / "data", "train.jsonl", "test.jsonl")
    config = DataConfig(train=f"{folder}#all", eval=f"{folder}#test", cache_dir=str(tmp_path / "cache"))
    report = prepare(config, f"{folder}#all", make_tokenizer()).report
    assert report.num_rows == 1
    assert report.notes == [f"not trained on, as data.eval holds it out (1 time, first in {folder}/test.jsonl)"]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-8-sig"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.tsv", "a.jsonl.gz"])
def test_text_in_another_unicode_encoding_is_read(tmp_path: Path, encoding: str, name: str) -> None:
    rows = [{"prompt": "größer\u2028?", "completion": "ਊ😀"}, {"prompt": "b", "completion": "c\u0a0d"}]
    text = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    if name == "a.json":
        text = json.dumps(rows, ensure_ascii=False)
    if name in ("a.csv", "a.tsv"):
        delimiter = "," if name == "a.csv" else "\t"
        text = "\r\n".join([f"prompt{delimiter}completion", *(delimiter.join(row.values()) for row in rows)])
    content = text.encode(encoding)
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    assert [row.values for row in load_rows(str(tmp_path / name))] == rows


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}'.encode("utf-16")[:-1], "begins as utf-16 and is something else: .* Save it as UTF-8"),
        ('{"text": "größer"}'.encode("latin-1"), "line 1 is not UTF-8: .* Save it as UTF-8"),
    ],
)
def test_text_that_is_not_unicode_is_told_with_what_to_do(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=message):
        list(load_rows(str(tmp_path / "a.jsonl")))

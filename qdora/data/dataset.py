"""Tokenised data, made once and kept on disk as plain arrays."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qdora.chat_template import DEFAULT_TEMPLATE
from qdora.config import DataConfig, DataFormat, Overlong, SampleBy
from qdora.data.columns import read_rows
from qdora.data.conversation import Told
from qdora.data.encode import NothingToLearn, detect, encode, own_form
from qdora.data.sources import Row, all_files, data_files, fingerprint, folder_of, is_text, passed_over
from qdora.errors import DataError

if TYPE_CHECKING:  # torch takes seconds to load, which `qdora show` need not wait for
    from torch import Tensor

CACHE_VERSION = 10
"""Counts up when the same data would be tokenised or stored differently."""
IGNORED = -100
"""Label of a position without a target."""
Integers = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(kw_only=True, slots=True)
class DataReport:
    """What became of the rows of a source."""

    source: str
    format: str
    num_rows: int = 0
    num_samples: int = 0
    num_tokens: int = 0
    num_label_tokens: int = 0
    num_truncated: int = 0
    num_split: int = 0
    num_dropped_overlong: int = 0
    num_dropped_without_labels: int = 0
    num_unknown: int = 0
    """Tokens that stand for what the tokenizer does not know."""
    fingerprint: str = ""
    """Of the samples as they are trained on, wherever they came from."""
    system: str | None = None
    """The system turn that every sample has and shows."""
    notes: list[str] = field(default_factory=list)
    """What a user should hear of: keys that nothing reads, rows that were left out, what the template does not show."""

    def describe(self, more: str = "") -> str:
        """One line for people, which ends with `more`, and one for each note."""
        text = (
            f"{self.source}: {self.num_samples:,} samples ({self.format}), {self.num_tokens:,} tokens, "
            f"{self.num_label_tokens:,} learned"
        )
        for count, what in (
            (self.num_truncated, "truncated"),
            (self.num_split, "cut into several"),
            (self.num_dropped_overlong, "dropped as too long"),
            (self.num_dropped_without_labels, "dropped without a token to learn"),
        ):
            text += f"; {count:,} {what}" if count else ""
        return "\n  ".join([text + more, *self.notes])


class TokenDataset:
    """Samples of token ids and shifted labels, memory-mapped from a cache folder."""

    def __init__(self, folder: Path) -> None:
        self._tokens = np.load(folder / "tokens.npy", mmap_mode="r")
        self._learned = np.load(folder / "learned.npy", mmap_mode="r")
        self._starts = np.load(folder / "starts.npy")
        self._folder = folder
        values = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        self.report = DataReport(**values)
        self.fingerprint = self.report.fingerprint

    @property
    def lengths(self) -> Integers:
        """Tokens of each sample, (samples,) int64."""
        lengths: Integers = np.diff(self._starts)
        return lengths

    @property
    def row_lengths(self) -> Integers:
        """Tokens of each row that has something to learn before it was cut or left out, (rows,) int64; from disk."""
        lengths: Integers = np.load(self._folder / "row_lengths.npy")
        return lengths

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, index: int) -> "tuple[Tensor, Tensor]":
        """Token ids and labels of a sample, (length,) int64 each; a label is the next token or `IGNORED`."""
        import torch

        ids, labels = self.arrays(index)
        return torch.from_numpy(ids), torch.from_numpy(labels)

    def arrays(self, index: int) -> tuple[Integers, Integers]:
        """The same as arrays, without torch."""
        some = slice(self._starts[index], self._starts[index + 1])
        ids, learned = self._tokens[some].astype(np.int64), self._learned[some]
        labels = np.full_like(ids, IGNORED)
        labels[:-1] = np.where(learned[1:], ids[1:], IGNORED)
        return ids, labels

    def where(self, index: int) -> str:
        """The place of a sample in its source, such as `data/x.jsonl line 7`; read from disk when asked."""
        names, places = self.places()
        file, number, _ = places[index]
        return f"{names[file]} {number}"

    def places(self) -> tuple[list[str], Integers]:
        """What places begin with, such as `data/x.jsonl line`; and of each sample (samples, 3) int64.

        That is which of these it has, its number in it, and which of `row_lengths` is its row's. Read from disk when
        asked.
        """
        names: list[str] = json.loads((self._folder / "places.json").read_text(encoding="utf-8"))
        return names, np.load(self._folder / "places.npy", mmap_mode="r")


def prepare(config: DataConfig, source: str, tokenizer: Any) -> TokenDataset:
    """The tokenised `source`; made on the first call, read from `config.cache_dir` afterwards.

    Raises:
        DataError: the source cannot be read, a row is not as its format wants it, or nothing is left to learn.
    """
    folder = _cache_folder(config) / _key(config, source, tokenizer)
    if not folder.exists():
        beside = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
        shutil.rmtree(beside, ignore_errors=True)
        try:
            beside.mkdir(parents=True)
            _tokenise(config, source, tokenizer, beside)
            beside.rename(folder)
        except OSError as error:
            if not folder.exists():  # else another process was first
                raise DataError(
                    f"the tokenised data could not be written: {error}. Make room, or give data.cache_dir=..."
                ) from None
        finally:
            shutil.rmtree(beside, ignore_errors=True)
    return TokenDataset(folder)


def _cache_folder(config: DataConfig) -> Path:
    if config.cache_dir is not None:
        return Path(config.cache_dir)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "qdora" / "data"


def _held_out(config: DataConfig, source: str) -> list[Path]:
    """The files of `data.eval`, where `source` is the folder that is trained on; they are not trained on."""
    is_folder = source == config.train and config.eval not in (None, source) and folder_of(source)[0] is not None
    return data_files(str(config.eval)) if is_folder else []


def _key(config: DataConfig, source: str, tokenizer: Any) -> str:
    if tokenizer.is_fast:
        vocabulary = tokenizer.backend_tokenizer.to_str()
    else:
        vocabulary = repr(sorted(tokenizer.get_vocab().items()))
    parts = (
        CACHE_VERSION,
        source,
        fingerprint(source, _held_out(config, source)),
        config.format.name,
        config.max_length,
        config.overlong.name,
        config.sample_by.name,
        config.reasoning.name,
        config.unknown_keys.name,
        sorted(config.ignore_keys),
        # What is not trained on may be read by its own names.
        (sorted(config.columns.items()), source == config.train) if config.columns else (),
        config.limit,
        vocabulary,
        tokenizer.chat_template or DEFAULT_TEMPLATE,
        tokenizer.eos_token_id,
        tokenizer.bos_token_id,
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:24]


def source_rows(
    config: DataConfig, source: str, tell: Callable[[str, str], None] = lambda what, where: None
) -> Iterator[Row]:
    """The rows of `source` that are used: not those that `data.eval` holds out, and `data.limit` at most.

    Args:
        tell: hears of rows that are read under their own names, with their place.

    Raises:
        DataError: nothing there, a line that cannot be read, or columns that are not as `data.columns` has them.
    """
    return read_rows(config, source, config.limit, _held_out(config, source), tell)


def _samples(
    config: DataConfig, source: str, tokenizer: Any, report: DataReport, row_lengths: list[int]
) -> Iterator[tuple[Any, Any, str]]:
    """Ids, mask and place of each sample that stays; counts and notes in `report`."""
    told, held_out = Told(), _held_out(config, source)
    for file in all_files(source) if held_out else []:
        if any(file.samefile(other) for other in held_out):
            told.add("not trained on, as data.eval holds it out", str(file))
    if config.sample_by is SampleBy.document:
        for file in data_files(source, held_out):
            if is_text(file):
                told.add("is one text; data.sample_by=line or paragraph reads each as one", str(file))
    for file in passed_over(source):
        told.add("is not read beside files of other kinds, only where it is named itself", str(file))
    yield from samples_of(source_rows(config, source, told.add), config, tokenizer, report, told, row_lengths)
    report.notes, report.system = told.lines(), told.system


def samples_of(
    rows: Iterable[Row], config: DataConfig, tokenizer: Any, report: DataReport, told: Told, row_lengths: list[int]
) -> Iterator[tuple[Any, Any, str]]:
    """Ids, mask and place of each sample of `rows` that stays.

    Args:
        report: its counts grow, and its format is set by the first row where `data.format` is auto.
        told: counts what a user should hear of.
        row_lengths: gets the tokens of each row before it is cut or left out.

    Raises:
        DataError: a row is not as its format wants it.
    """
    form, first = config.format, ""
    rows = iter(rows)
    for row in rows:
        if form is DataFormat.auto:
            form, first = detect(row, config), row.where
            report.format = form.name
        report.num_rows += 1
        try:
            ids, learned = encode(row, form, tokenizer, config, told)
        except NothingToLearn as nothing:
            report.num_dropped_without_labels += 1
            told.add(f"left out: {str(nothing).removeprefix(row.where).lstrip(': ')}", row.where)
            continue
        except DataError as error:
            own = own_form(row, config)
            if config.format is not DataFormat.auto or own is form or row.where == first:
                raise
            if own is None:
                raise DataError(f"{error}. The format is that of the first row, {first}") from None
            raise _several_formats(form, first, chain([row], rows), config) from None
        row_lengths.append(len(ids))
        num_unknown = _num_unknown(ids, tokenizer)
        if num_unknown:
            report.num_unknown += num_unknown
            told.add(f"has text that the tokenizer does not know, as {tokenizer.unk_token}", row.where)
        length, step = config.max_length, config.max_length
        if len(ids) > length:
            if config.overlong is Overlong.drop:
                report.num_dropped_overlong += 1
                told.add(f"left out: longer than data.max_length={length}", row.where)
                continue
            if _is_split(config.overlong, form):
                step = length - 1  # the last token of a sample is the first of the next, which learns what follows it
                report.num_split += 1
                told.add(f"cut into samples of data.max_length={length} tokens", row.where)
            else:
                report.num_truncated += 1
                told.add(f"cut to data.max_length={length}", row.where)
                ids, learned = ids[:length], learned[:length]
        for start in range(0, max(1, len(ids) - 1), step):
            some, of_these = ids[start : start + length], learned[start : start + length]
            num_labels = sum(of_these[1:])
            if not num_labels:
                report.num_dropped_without_labels += 1
                told.add("left out: no token to learn is left of it", row.where)
                continue
            report.num_samples += 1
            report.num_tokens += len(some)
            report.num_label_tokens += num_labels
            yield some, of_these, row.where


def _num_unknown(ids: list[int], tokenizer: Any) -> int:
    """Returns how many tokens stand for unknown text; none where that token has another use, as an end of sequence."""
    unknown = tokenizer.unk_token_id
    others = (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id)
    return 0 if unknown is None or unknown in others else ids.count(unknown)


def _several_formats(form: DataFormat, first: str, others: Iterable[Row], config: DataConfig) -> DataError:
    """Returns what is said of rows of several formats: the first place of each.

    Args:
        form: that of the rows before, and the place of the first of them.
        others: the rows from the first one of another format on.
    """
    places = {form: first}
    with suppress(DataError):  # what cannot be read is told once the formats are sorted out
        for row in others:
            other = own_form(row, config)
            if other is not None:
                places.setdefault(other, row.where)
    found = ", ".join(f"{other.name}: {where}" for other, where in places.items())
    return DataError(
        f"the rows are of several formats ({found}), and a run reads one: give the files of one format, in a folder of "
        "their own or by name (data.train=FILE), or write all rows as messages"
    )


def _is_split(overlong: Overlong, form: DataFormat) -> bool:
    if overlong is Overlong.split and form is not DataFormat.text:
        raise DataError(
            f"data.overlong=split cuts texts, and a sample of the format {form.name} is a question and its answer: use "
            "truncate or drop, or raise data.max_length"
        )
    return overlong is Overlong.split or (overlong is Overlong.auto and form is DataFormat.text)


def _tokenise(config: DataConfig, source: str, tokenizer: Any, folder: Path) -> None:
    report = DataReport(source=source, format=config.format.name)
    starts = [0]
    files: dict[str, int] = {}
    places: list[tuple[int, int]] = []
    row_lengths: list[int] = []
    rows: list[int] = []
    with (folder / "tokens.bin").open("wb") as tokens, (folder / "learned.bin").open("wb") as mask:
        for ids, learned, where in _samples(config, source, tokenizer, report, row_lengths):
            tokens.write(np.asarray(ids, dtype=np.int32).tobytes())
            mask.write(np.asarray(learned, dtype=np.bool_).tobytes())
            starts.append(starts[-1] + len(ids))
            file, _, number = where.rpartition(" ")  # the text before the number is the same all through a file
            places.append((files.setdefault(file, len(files)), int(number)))
            rows.append(len(row_lengths) - 1)
    if not report.num_rows:
        raise DataError(f"{source} is empty: it has no row")
    if not report.num_samples:
        raise DataError(
            f"{source}: none of its {report.num_rows} rows has a token left to learn within data.max_length="
            f"{config.max_length} ({report.num_truncated} were truncated, {report.num_dropped_overlong} dropped as too "
            f"long): raise data.max_length, or see what became of them: {'; '.join(report.notes)}"
        )
    digest = hashlib.sha256(np.asarray(starts, dtype=np.int64).tobytes())
    for name, kind in (("tokens", np.int32), ("learned", np.bool_)):
        with (folder / f"{name}.bin").open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
        np.save(folder / f"{name}.npy", np.fromfile(folder / f"{name}.bin", dtype=kind))
        (folder / f"{name}.bin").unlink()
    np.save(folder / "starts.npy", np.asarray(starts, dtype=np.int64))
    np.save(folder / "row_lengths.npy", np.asarray(row_lengths, dtype=np.int64))
    np.save(folder / "places.npy", np.column_stack([places, rows]).astype(np.int64))
    (folder / "places.json").write_text(json.dumps([*files]) + "\n", encoding="utf-8")
    report.fingerprint = digest.hexdigest()[:24]
    (folder / "report.json").write_text(json.dumps(asdict(report), indent=2) + "\n", encoding="utf-8")

"""What `qdora show` prints: samples first, then what became of the rows, and last how long they are."""

import io
import json
import os
import re
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from qdora.config import DataFormat, Pick, Report, ShowConfig
from qdora.config.groups import ACCUMULATION_STEPS
from qdora.data import BatchLoader, DataReport, TokenDataset, prepare
from qdora.data.conversation import Told
from qdora.data.dataset import IGNORED, Integers, samples_of, source_rows
from qdora.errors import ConfigError
from qdora.files import check_writable, naming_option, output_may_close
from qdora.planning.length import fitted
from qdora.show.lengths import Lengths, draw, histogram
from qdora.show.spelling import Spelling
from qdora.show.terminal import bold, painted, token_lines, visible, wants_colours

MOST_COLUMNS = 80
TEMPLATE_OF_OURS = "qdora's headings, as the model has no chat template"
FROM_CHAT = (DataFormat.messages.name, DataFormat.instruction.name)


@dataclass(frozen=True, slots=True)
class Sample:
    """What the model is given of a row of the data."""

    index: int
    where: str
    """`data/x.jsonl:7`; `x.parquet row 7` where a file has no lines."""
    part: str
    """What of its row it is, where that was cut."""
    ids: Integers
    labels: Integers

    @property
    def learned(self) -> list[bool]:
        """Whether each token is the label of the one before it."""
        return [False, *(self.labels[:-1] != IGNORED).tolist()]


def num_ranks() -> int:
    """Returns how many ranks would train: torchrun's, else those that `NPROC` asks the launch scripts for, else one."""
    for name in ("WORLD_SIZE", "NPROC"):
        if (number := os.environ.get(name, "")).isdecimal() and int(number):
            return int(number)
    return 1


class Source:
    """The data of one option: tokenised as a run does it, or read from where a run has left it."""

    def __init__(self, name: str, config: ShowConfig, tokenizer: Any) -> None:
        self.name, self.config, self.tokenizer = name, config, tokenizer
        self.path = str(getattr(config.data, name.partition(".")[2]))
        self.data: TokenDataset = prepare(config.data, self.path, tokenizer)
        self.report: DataReport = self.data.report
        is_trained = name == "data.train"
        self.loader = BatchLoader(
            self.data,
            micro_batch_size=config.train.micro_batch_size,
            num_accumulation_steps=1,
            max_length=config.data.max_length,
            packing=config.data.packing,
            rank=0,
            world_size=num_ranks() if is_trained else 1,
            seed=config.seed,
            shuffle=is_trained,
        )
        if is_trained:
            length = fitted(config.train, self.loader.num_rows, num_ranks=num_ranks())
            self.loader.num_accumulation_steps = length.num_accumulation_steps or ACCUMULATION_STEPS
        self.names, self.places = self.data.places()
        then = "left out" if self.report.num_dropped_overlong else "cut"
        self.lengths = Lengths(name, self.data.row_lengths, config.data.max_length, then)

    def sample(self, index: int) -> Sample:
        """A sample of the data, as the trainer gets it."""
        file, number, row = self.places[index]
        name = self.names[file]
        where = f"{name.removesuffix(' line')}:{number}" if name.endswith(" line") else f"{name} {number}"
        same = np.flatnonzero(self.places[:, 2] == row)
        length = self.lengths.tokens[row]
        part = f", part {index - same[0] + 1} of {len(same)} of a row of {length:,} tokens" if len(same) > 1 else ""
        if len(same) == 1 and length > self.config.data.max_length:
            part = f", cut from {length:,} tokens"
        return Sample(index, where, part, *self.data.arrays(index))

    def rows(self) -> Iterator[tuple[int, list[int]]]:
        """Places and samples of the rows that may be printed, in the order that is asked for."""
        rows, pick, sizes = self.loader.rows if self.config.packed else None, self.config.pick, self.data.lengths
        if rows is not None:
            sizes = np.asarray([int(sizes[row].sum()) for row in rows])
        order: Iterable[int] = range(len(sizes))
        if pick is Pick.random:
            order = np.random.default_rng(self.config.seed).permutation(len(sizes))
        elif pick is not Pick.first:
            order = np.argsort(-sizes if pick is Pick.longest else sizes, kind="stable")
        yield from ((int(place), [int(place)] if rows is None else rows[place]) for place in order)

    def chosen(self, spelling: Spelling) -> Iterator[tuple[int, list[Sample]]]:
        """Places and samples of the rows to print."""
        at, find = self.config.at, self.config.find
        wanted = None if at is None else {index for one in numbers_of(at) for index in self.indices(*one)}
        left = self.config.num if wanted is None else len(self.data)
        for place, row in self.rows() if left else ():
            if wanted is not None and wanted.isdisjoint(row):
                continue
            if find is not None and not any(find in spelling.text(self.data.arrays(index)[0]) for index in row):
                continue
            yield place, [self.sample(index) for index in row]
            left -= 1
            if not left:
                return

    def indices(self, file: str, number: int) -> list[int]:
        """The samples of one line or row of the files whose names end with `file`."""
        files = [place for place, name in enumerate(self.names) if _is_named(name, file)]
        return np.flatnonzero((self.places[:, 1] == number) & np.isin(self.places[:, 0], files)).tolist()

    def absent(self, file: str, number: int) -> str | None:
        """Why a row has no sample; None where there is no such row."""
        config = replace(self.config.data, format=DataFormat[self.report.format])
        for row in source_rows(self.config.data, self.path):
            name, _, own = row.where.rpartition(" ")
            if int(own) == number and _is_named(name, file):
                told = Told()
                list(samples_of([row], config, self.tokenizer, DataReport(source="", format=""), told, []))
                return f"{row.where}: {'; '.join(what for what in told.seen if what.startswith('left out'))}"
        return None


def run(config: ShowConfig, tokenizer: Any) -> int:
    """Prints what the configuration asks for; see `qdora.show.show`."""
    if config.figure is not None:
        check_writable("figure", config.figure)
    sources = []
    for name in ("train", "eval"):
        path = getattr(config.data, name)
        if path is not None:
            with _told_meanwhile(f"reading {path}"):
                sources.append(Source(f"data.{name}", config, tokenizer))
    absent, spelling = _absent(config, sources), Spelling(tokenizer)
    if not _is_utf8() and isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    with output_may_close():
        if config.report is Report.json:
            values = {source.name: as_values(source, spelling) for source in sources}
            print(json.dumps(values | ({"left_out": absent} if absent else {}), indent=2))
        else:
            colours = wants_colours()
            for source in sources:
                for line in page(source, spelling, colours):
                    print(line)
            for line in absent:
                print(f"{visible(line)}\n")
            for source in sources:
                print("\n".join(summary(source, colours)))
        sys.stdout.flush()
    if config.figure is not None:
        with naming_option("figure", config.figure):
            draw([source.lengths for source in sources], str(config.model.path), Path(config.figure))
    return 0


def page(source: Source, spelling: Spelling, colours: bool) -> Iterator[str]:
    """The samples to print, for people."""
    config, loader, is_empty = source.config, source.loader, True
    for place, samples in source.chosen(spelling):
        is_empty = False
        if config.packed:
            num_tokens, num_learned = sum(len(one.ids) for one in samples), sum(sum(one.learned) for one in samples)
            plural = "s" * (len(samples) > 1)
            text = f"row {place + 1} of {loader.num_rows}, in step {place // loader.rows_per_step + 1}: {len(samples)} "
            text += f"sample{plural}, {num_tokens:,} of {config.data.max_length:,} tokens, {num_learned:,} learned"
            yield f"{bold(text, colours)}\n"
        first = 0
        for sample in samples:
            text = f"{visible(sample.where)}  sample {sample.index + 1:,} of {len(source.data):,}{sample.part}"
            text += f"{f', from token {first:,} of the row on' if config.packed else ''}: {len(sample.ids):,} tokens, "
            yield bold(f"{text}{sum(sample.learned):,} learned", colours)
            if config.tokens:
                start = first if config.packed else None
                yield from token_lines(spelling, sample.ids.tolist(), sample.learned, start, colours)
                yield ""
            else:
                yield painted(spelling.runs(sample.ids.tolist(), sample.learned), colours)
            first += len(sample.ids)
    if is_empty and config.find is not None and config.num:
        yield f"no sample of {source.name} has {config.find!r}\n"


def summary(source: Source, colours: bool) -> Iterator[str]:
    """What became of the rows, and how long they are, for people."""
    report, config, loader, lengths = source.report, source.config, source.loader, source.lengths
    template = "the model's chat template" if source.tokenizer.chat_template else TEMPLATE_OF_OURS
    form = f"{report.format}, {template}" if report.format in FROM_CHAT else report.format
    yield f"{bold(f'{source.name}: {visible(source.path)}', colours)} ({form})"
    limit, share = f"data.max_length={config.data.max_length:,}", report.num_label_tokens / report.num_tokens
    for count, what in (
        (report.num_rows, "rows read"),
        (report.num_dropped_overlong, f"left out, longer than {limit}"),
        (report.num_dropped_without_labels, "left out without a token to learn"),
        (report.num_truncated, f"cut to {limit}"),
        (report.num_split, f"cut into samples of {limit}"),
        (report.num_samples, "samples"),
        (report.num_tokens, "tokens"),
        (report.num_label_tokens, f"learned, {share:.1%} of them"),
        (report.num_unknown, f"that the tokenizer does not know: {source.tokenizer.unk_token}"),
    ):
        if count or what in ("rows read", "samples"):
            yield f"  {count:>13,}  {what}"
    yield from (f"  {visible(note)}" for note in report.notes)
    rows = f"{loader.num_rows:,} row{'s' * (loader.num_rows > 1)}"
    full = f" of {config.data.max_length:,} tokens, {loader.packing_efficiency:.0%} full" if config.data.packing else ""
    steps = f"{loader.steps_per_epoch:,} step{'s' * (loader.steps_per_epoch > 1)}"
    steps += f" of {loader.rows_per_step} row{'s' * (loader.rows_per_step > 1)}"
    ranks = loader.world_size
    of_rank = f"; {steps} on {'one rank' if ranks == 1 else f'{ranks} ranks'}" if source.name == "data.train" else ""
    yield f"  {'an epoch' if of_rank else 'an evaluation'}: {rows}{full}{of_rank}\n"
    numbers = lengths.numbers()
    yield bold("tokens a row before anything is cut", colours) + (
        f": least {numbers['least']:,}, median {numbers['median']:,}, 90% within {numbers['p90']:,}, "
        f"99% within {numbers['p99']:,}, longest {numbers['longest']:,}"
    )
    columns = min(shutil.get_terminal_size((MOST_COLUMNS, 24)).columns, MOST_COLUMNS)
    yield from histogram(lengths, columns, _is_utf8())
    yield ""


def as_values(source: Source, spelling: Spelling) -> dict[str, Any]:
    """The same for machines: of each sample the ids, and labels as the trainer has them."""
    rows = []
    for place, samples in source.chosen(spelling):
        first, written = 0, []
        for sample in samples:
            runs = spelling.runs(sample.ids.tolist(), sample.learned)
            written.append(
                {
                    "where": sample.where,
                    "index": sample.index,
                    "first_position": first,
                    "num_tokens": len(sample.ids),
                    "num_label_tokens": sum(sample.learned),
                    "text": spelling.text(sample.ids),
                    "pieces": [{"text": run.plain, "learned": run.learned} for run in runs],
                    "input_ids": sample.ids.tolist(),
                    "labels": sample.labels.tolist(),
                }
            )
            first += len(sample.ids)
        rows.append({"row": place, "samples": written})
    loader = source.loader
    return {
        "report": asdict(source.report),
        "lengths": source.lengths.numbers(),
        "rows_per_epoch": loader.num_rows,
        "rows_per_step": loader.rows_per_step,
        "steps_per_epoch": loader.steps_per_epoch,
        "chat_template": bool(source.tokenizer.chat_template),
        "rows": rows,
    }


def numbers_of(at: str) -> list[tuple[str, int]]:
    """`7,FILE:9` as files, empty for any, and numbers of their lines or rows."""
    parts = [part.rpartition(":") for part in re.split(r"(?<=\d),", at)]
    return [(file, int(number)) for file, _, number in parts]


def _absent(config: ShowConfig, sources: Sequence[Source]) -> list[str]:
    """Returns why rows that `at` names gave no sample.

    Raises:
        ConfigError: there is no such row.
    """
    lines = []
    for file, number in numbers_of(config.at) if config.at is not None else []:
        if any(source.indices(file, number) for source in sources):
            continue
        why = next(filter(None, (source.absent(file, number) for source in sources)), None)
        if why is None:
            given = " and ".join(f"{source.name} ({source.report.num_rows:,} rows)" for source in sources)
            raise ConfigError(
                f"at={f'{file}:' * bool(file)}{number}: no such line or row in {given}; they are counted from 1 in "
                "each file, as messages name them"
            )
        lines.append(why)
    return lines


def _is_named(name: str, file: str) -> bool:
    """Whether a place that begins with `name` is in that file, which may be the end of a path or another way to it."""
    path, given = Path(name.rpartition(" ")[0]), Path(file).expanduser()
    is_end = path.parts[-len(given.parts) :] == given.parts
    return not file or is_end or path.expanduser().resolve() == given.resolve()


def _is_utf8() -> bool:
    return (sys.stdout.encoding or "").lower() in ("utf-8", "utf8")


@contextmanager
def _told_meanwhile(text: str) -> Iterator[None]:
    """Shows a line on a terminal's stderr while something goes on, and takes it away."""
    is_shown = sys.stderr.isatty()
    if is_shown:
        print(text, end="", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        if is_shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)

"""What a study has come to: study.json, a table, the numbers of every run and sample, and the figure."""

import csv
import gzip
import io
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from qdora.config import StudyConfig
from qdora.config.values import plain
from qdora.errors import ConfigError
from qdora.files import read_json, write_durably
from qdora.run_folder import read_metrics
from qdora.study.cells import Arm, Cell, arms, compared, measured, search, start_of, starts
from qdora.study.statistics import COVERAGE, NUM_DRAWS, Scores, differences

EVALUATION = "evaluation/results.json"
COMPARED = {("dora", "lora"), ("dvora", "vera"), *((adapter, "none") for adapter in ("lora", "dora", "vera", "dvora"))}
"""Adapters whose difference says something: DoRA's part, and what is missing to full fine-tuning."""
DIGITS = {"loss": 4, "accuracy": 3}
"""What arms are compared by, the primary one first (nats a token of the answer), and how exactly it is shown."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """The compared runs of one arm."""

    arm: Arm
    learning_rate: float
    is_at_edge: bool
    """Whether the learning rate is the lowest or highest of several that were tried: a better one may lie beyond."""
    runs: list[dict[str, Any]]
    """For each seed what was measured in training."""
    scores: dict[str, Scores]
    """By measure."""


def conclude(config: StudyConfig, folder: Path, rates: dict[Arm, float]) -> bool:
    """Writes and shows everything; returns whether every run that is compared is there."""
    outcomes: list[Outcome] = []
    missing: list[str] = []
    expected = None
    for arm in arms(config):
        cells = [cell for cell in compared(config, rates) if cell.arm == arm]
        absent = [cell.name for cell in cells if not (folder / cell.name / EVALUATION).exists()]
        missing += absent
        if cells and not absent:
            results = [read_json(folder / cell.name / EVALUATION) for cell in cells]
            expected = expected or _asked(results[0])
            for cell, one in zip(cells, results, strict=True):
                if _asked(one) != expected:
                    told = f"{cell.name} was scored on other samples than the first run: remove its {EVALUATION}"
                    raise ConfigError(told)
            training = [measured(folder / cell.name) for cell in cells]
            outcomes.append(_outcome(config, arm, cells[0].learning_rate, results, training))
    pairs = _pairs(config, outcomes)
    values = {
        "config": plain(asdict(config)),
        "arms": [_summary(outcome, config) for outcome in outcomes],
        "bases": _bases(config, folder),
        "search": [_searched(folder, cell) for cell in search(config)],
        "differences": pairs,
        "interval": f"{COVERAGE:.0%}, of {NUM_DRAWS} draws of samples and of {len(config.seeds)} seeds",
        "missing": missing,
    }
    write_durably(folder / "study.json", json.dumps(values, indent=2) + "\n")
    _write_runs(folder, {*search(config), *compared(config, rates)})
    _write_samples(folder, outcomes, config)
    _show(folder, values)
    if outcomes:
        from qdora.study.figure import draw

        draw(folder / "study.png", values)
        print(f"figure: {folder / 'study.png'}")
    for name in missing:
        print(f"{name} has not ended, or was not scored: the same command tries it again")
    return not missing


def _asked(results: dict[str, Any]) -> list[tuple[Any, ...]]:
    """What pairs the samples of two runs; by a file's name, as its folder may have moved."""
    return [
        (sample["task"], sample["where"].rpartition("/")[2], sample["num_label_tokens"])
        for sample in results["samples"]
    ]


def _outcome(
    config: StudyConfig, arm: Arm, rate: float, results: list[dict[str, Any]], training: list[dict[str, Any]]
) -> Outcome:
    """`results` and `training` of each seed."""
    names = list(results[0]["tasks"])
    samples = [result["samples"] for result in results]
    tasks = np.array([names.index(sample["task"]) for sample in samples[0]])
    tokens = np.array([float(sample["num_label_tokens"]) for sample in samples[0]])
    columns = {"loss": "loss"} | ({"accuracy": "correct"} if "correct" in samples[0][0] else {})
    scores = {
        measure: Scores(
            np.array([[float(sample[column]) for sample in some] for some in samples]),
            tokens if measure == "loss" else np.ones_like(tokens),
            tasks,
        )
        for measure, column in columns.items()
    }
    tried = config.methods[arm.method].learning_rates
    return Outcome(arm, rate, len(tried) > 1 and rate in (min(tried), max(tried)), training, scores)


def _summary(outcome: Outcome, config: StudyConfig) -> dict[str, Any]:
    seeds = {measure: scores.each_seed() for measure, scores in outcome.scores.items()}
    means = {measure: float(np.mean(values)) for measure, values in seeds.items()}
    return {
        "arm": outcome.arm.label,
        "method": outcome.arm.method,
        "rank": outcome.arm.rank,
        "quant": config.methods[outcome.arm.method].quant.name,
        "learning_rate": outcome.learning_rate,
        "learning_rate_at_edge": outcome.is_at_edge,
        **means,
        "seeds": seeds,
        "training": outcome.runs,
    }


def _pairs(config: StudyConfig, outcomes: list[Outcome]) -> list[dict[str, Any]]:
    """Differences of arms that differ in one thing, the adapter or the quantisation, at the same rank.

    Where four arms allow it, also how much the difference between DoRA and LoRA changes over NF4.
    """
    by_arm = {(outcome.arm.method, outcome.arm.rank): outcome for outcome in outcomes}
    pairs: list[tuple[str, list[Outcome], list[Outcome]]] = []
    for plus in outcomes:
        for minus in outcomes:
            if _differ_in_one(config, plus.arm, minus.arm):
                pairs.append((f"{plus.arm.label} - {minus.arm.label}", [plus], [minus]))
    for some in _squares(config, by_arm):
        first, second, third, fourth = (outcome.arm.label for outcome in some)
        pairs.append((f"({first} - {second}) - ({third} - {fourth})", [some[0], some[3]], [some[1], some[2]]))
    found: list[dict[str, Any]] = [
        {"label": label, "rank": plus[0].arm.rank or minus[0].arm.rank} for label, plus, minus in pairs
    ]
    for measure in outcomes[0].scores if outcomes else ():
        sides = [[[outcome.scores[measure] for outcome in side] for side in pair[1:]] for pair in pairs]
        for values, one in zip(found, differences([(plus, minus) for plus, minus in sides]), strict=True):
            values[measure] = asdict(one)
    return found


def _differ_in_one(config: StudyConfig, plus: Arm, minus: Arm) -> bool:
    """Each pair once: the adapter that has more to it less the other, NF4 less unquantised."""
    first, second = config.methods[plus.method], config.methods[minus.method]
    if plus == minus or (None not in (plus.rank, minus.rank) and plus.rank != minus.rank):
        return False
    ours, theirs = (start_of(config, arm.method).replace("dequantised", "nf4") for arm in (plus, minus))
    if ours == theirs:
        return (first.adapter.name, second.adapter.name) in COMPARED
    return first.adapter is second.adapter and ours == "nf4"


def _squares(config: StudyConfig, by_arm: dict[tuple[str, int | None], Outcome]) -> list[tuple[Outcome, ...]]:
    """(QDoRA, QLoRA, DoRA, LoRA) of the same rank, where all are there."""
    names = {(own.adapter.name, own.quant.name): name for name, own in config.methods.items() if not own.dequantised}
    wanted = [names.get(key) for key in (("dora", "nf4"), ("lora", "nf4"), ("dora", "none"), ("lora", "none"))]
    squares = []
    for rank in sorted({rank for _, rank in by_arm if rank is not None}):
        some = [by_arm.get((str(name), rank)) for name in wanted]
        if all(outcome is not None for outcome in some):
            squares.append(tuple(outcome for outcome in some if outcome is not None))
    return squares


def _bases(config: StudyConfig, folder: Path) -> dict[str, dict[str, Any]]:
    """What the methods start from, as it was scored."""
    found = {f"base-{name}": _task_scores(folder / f"base-{name}" / "results.json") for name in starts(config)}
    return {name: scores for name, scores in found.items() if scores}


def _searched(folder: Path, cell: Cell) -> dict[str, Any]:
    values = {"arm": cell.arm.label, "learning_rate": cell.learning_rate, "folder": cell.name}
    return values | {"eval_loss": measured(folder / cell.name).get("eval_loss")}


def _task_scores(path: Path) -> dict[str, Any]:
    return {name: value for name, value in read_json(path).items() if name not in ("samples", "identity")}


def _write_runs(folder: Path, cells: set[Cell]) -> None:
    """Options, summary, metrics and scores of every run, a line each."""
    lines = []
    for cell in sorted(cells, key=lambda one: one.name):
        run = folder / cell.name
        values: dict[str, Any] = {"name": cell.name}
        if (run / "config.yaml").exists():
            values["config"] = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
        if (run / "summary.json").exists():
            values["summary"] = json.loads((run / "summary.json").read_text(encoding="utf-8"))
        values["metrics"] = read_metrics(run / "metrics.jsonl")
        if (run / EVALUATION).exists():
            values["evaluation"] = _task_scores(run / EVALUATION)
        lines.append(json.dumps(values) + "\n")
    _write_packed(folder / "runs.jsonl.gz", "".join(lines))


def _write_samples(folder: Path, outcomes: list[Outcome], config: StudyConfig) -> None:
    """The loss on the answer, and whether the choice was right, of each sample in each compared run."""
    if not outcomes:
        return
    text = io.StringIO()
    writer = csv.writer(text)
    names = [f"{outcome.arm.label} seed {seed}" for outcome in outcomes for seed in config.seeds]
    writer.writerow(["task", *(f"{measure} {name}" for name in names for measure in outcomes[0].scores)])
    first = outcomes[0].scores["loss"]
    for sample, task in enumerate(first.tasks):
        cells = [
            outcome.scores[measure].values[seed, sample]
            for outcome in outcomes
            for seed in range(len(config.seeds))
            for measure in outcomes[0].scores
        ]
        writer.writerow([int(task), *(f"{value:.5g}" for value in cells)])
    _write_packed(folder / "samples.csv.gz", text.getvalue())


def _write_packed(path: Path, text: str) -> None:
    """The same bytes for the same text."""
    path.write_bytes(gzip.compress(text.encode(), mtime=0))


def _show(folder: Path, values: dict[str, Any]) -> None:
    """The arms, the bases, and the differences; on the terminal and in study.md."""
    measures = {name: digits for name, digits in DIGITS.items() if all(name in arm for arm in values["arms"])}
    beside = ["chance", "majority"] if "accuracy" in measures else []
    rows = [["", "learning rate", *measures, *beside]]
    for name, base in values["bases"].items():
        scores = [f"{base[measure]:.{digits}f}" for measure, digits in measures.items()]
        rows.append([name, "", *scores, *(f"{base[one]:.3f}" for one in beside)])
    for arm in values["arms"]:
        scores = [f"{arm[name]:.{digits}f}{_spread(arm['seeds'][name], digits)}" for name, digits in measures.items()]
        edge = " (edge)" if arm["learning_rate_at_edge"] else ""
        rows.append([arm["arm"], f"{arm['learning_rate']:g}{edge}", *scores, *[""] * len(beside)])
    pairs = [["difference", *(title for name in measures for title in (name, "interval"))]]
    for pair in values["differences"]:
        pairs.append([pair["label"]])
        for name, digits in measures.items():
            one = pair[name]
            pairs[-1] += [f"{one['mean']:+.{digits}f}", f"{one['low']:+.{digits}f} to {one['high']:+.{digits}f}"]
    notes = f"± is the standard deviation over seeds; intervals: {values['interval']}."
    write_durably(folder / "study.md", "\n".join([_markdown(rows), _markdown(pairs), notes, ""]))
    console = Console(highlight=False)
    for title, some in ((f"study {folder}", rows), (notes, pairs)):
        table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE)
        for number, column in enumerate(some[0]):
            table.add_column(column, justify="right" if number else "left", overflow="fold")
        for row in some[1:]:
            table.add_row(*row)
        console.print(table)


def _spread(seeds: list[float], digits: int) -> str:
    return f" ± {np.std(seeds, ddof=1):.{digits}f}" if len(seeds) > 1 else ""


def _markdown(rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|" + " --- |" * len(rows[0]))
    return "\n".join(lines) + "\n"

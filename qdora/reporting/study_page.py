"""The page of a study, from study.json and the numbers behind it."""

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from qdora.config.values import flatten, option
from qdora.errors import ConfigError
from qdora.figures import GREEN, GREY, ORANGE
from qdora.files import read_json
from qdora.reporting.figures import Interval, by_rank, forest, search, training_curves
from qdora.reporting.files import read_packed_lines
from qdora.reporting.page import (
    DASH,
    MINUS,
    Commands,
    Facts,
    Figure,
    Figures,
    Finding,
    Findings,
    Folded,
    Link,
    Page,
    Part,
    Section,
    Table,
    Text,
    number,
)
from qdora.reporting.reproduce import command, study_command
from qdora.reporting.run_page import NAMES, shown
from qdora.study.cells import Arm, Cell
from qdora.study.figure import TITLES, look
from qdora.study.results import DIGITS
from qdora.study.statistics import COVERAGE

Values = dict[str, Any]
LOWER_IS_BETTER = {"loss": True, "accuracy": False}


def study_page(folder: Path, beside: Path) -> Page:
    """All that study.json tells.

    Args:
        beside: the folder that the page will lie in, from which its links lead to the runs.

    Raises:
        ConfigError: there is no study, or none that has come to anything.
    """
    values = read_json(folder / "study.json")
    if not values.get("arms"):
        raise ConfigError(f"study={folder}: there is no result yet (no study.json with an arm): qdora study goes on")
    runs = {run["name"]: run for run in read_packed_lines(folder / "runs.jsonl.gz") if "name" in run}
    measures = [name for name in DIGITS if all(name in arm for arm in values["arms"])]
    facts = _facts(values)
    sections = [
        Section("overview", "Overview", [Facts(facts)]),
        Section("reading", "What the numbers say", [Findings(findings(values, measures))]),
        Section("results", "Results", _results(values, measures)),
        Section("differences", "Differences", _differences(values, measures)),
        Section("search", "Search for the learning rate", _search(values)),
        Section("curves", "Training of the compared runs", _curves(values, runs)),
        Section("cost", "What training took", _cost(values)),
        Section("runs", "Runs", _runs(values, folder, beside)),
        Section("options", "Options", _options(values)),
        Section("commands", "Commands", _commands(values, folder)),
        Section("versions", "Versions", _versions(runs)),
    ]
    told = [f"{name} {value}" for name, value in facts]
    return Page(f"Study {folder.resolve().name}", " \N{MIDDLE DOT} ".join(told), sections)


def _facts(values: Values) -> list[tuple[str, str]]:
    config, first = values["config"], values["arms"][0]["training"][0]
    pairs = [
        ("Model", str(config["model"]["path"])),
        ("Methods", ", ".join(config["methods"])),
        ("Ranks", ", ".join(map(str, config["ranks"]))),
        ("Seeds", ", ".join(map(str, config["seeds"]))),
        ("Compared on", f"{', '.join(config['tasks'])} ({config['protocol']})"),
    ]
    if first.get("num_tokens") is not None:
        pairs += [("Steps a run", f"{first['steps']:,}"), ("Tokens a run", f"{first['num_tokens']:,}")]
    return pairs


def findings(values: Values, measures: list[str]) -> list[Finding]:
    """For each rank and start DoRA less LoRA (and DVoRA less VeRA), in words, and what limits them."""
    found = []
    for label, difference in dora_less_lora(values):
        found += [_finding(label, measure, difference[measure]) for measure in measures]
    found += [Finding("note", text) for text in _limits(values, measures, len(found))]
    return found


def dora_less_lora(values: Values) -> Iterator[tuple[str, Values]]:
    """The differences of a DoRA and a LoRA arm, or a DVoRA and a VeRA one, that are the same otherwise."""
    adapters = {name: method["adapter"] for name, method in values["config"]["methods"].items()}
    of = {arm["arm"]: adapters[arm["method"]] for arm in values["arms"]}
    for difference in values["differences"]:
        plus, _, minus = difference["label"].partition(" - ")
        if (of.get(plus), of.get(minus)) in (("dora", "lora"), ("dvora", "vera")):
            yield f"{plus} against {minus}", difference


def verdict(one: Values, lower_is_better: bool) -> str:
    """`better` or `worse` where the interval leaves zero out, else `same`."""
    if not (one["low"] > 0 or one["high"] < 0):  # also where it is no number
        return "same"
    return "better" if (one["mean"] < 0) == lower_is_better else "worse"


def _finding(label: str, measure: str, one: Values) -> Finding:
    form = f"+.{DIGITS[measure]}f"
    tone = verdict(one, LOWER_IS_BETTER[measure])
    word = {"better": "better", "worse": "worse", "same": "no difference that the interval shows"}[tone]
    between = f"{number(one['low'], form)} to {number(one['high'], form)}"
    return Finding(tone, f"{label}, {measure}: {word} ({number(one['mean'], form)}; {between})")


def _limits(values: Values, measures: list[str], num_findings: int) -> Iterator[str]:
    """What else a reader should know."""
    seeds = len(values["config"]["seeds"])
    told = f"{seeds} seed{'s' * (seeds > 1)}"
    known = "they know nothing of seeds" if seeds == 1 else "they are wide where seeds differ, as these are few"
    yield f"Intervals: {values['interval']}. With {told} {known}."
    yield "The first seed also found the learning rates, on other rows."
    if num_findings > 1:
        chance = num_findings * (1 - COVERAGE)
        yield f"Of {num_findings} such intervals about {chance:.1g} would leave zero out even if nothing differed."
    if edges := [arm["arm"] for arm in values["arms"] if arm["learning_rate_at_edge"]]:
        yield f"At the lowest or highest learning rate that was tried, a better one may lie beyond: {', '.join(edges)}."
    bases = values["bases"].values()
    level = max((base.get(name, 0.0) for base in bases for name in ("chance", "majority")), default=0.0)
    if "accuracy" in measures and level:
        below = [arm["arm"] for arm in values["arms"] if arm["accuracy"] <= level]
        if below:
            yield f"No more accurate than guesses or the most frequent answer ({level:.3f}): {', '.join(below)}."
    if values["missing"]:
        yield f"Runs that have not ended or were not scored: {', '.join(values['missing'])}."


def _results(values: Values, measures: list[str]) -> list[Part]:
    beside = [name for name in ("chance", "majority") if any(name in base for base in values["bases"].values())]
    columns = ["", "learning rate"]
    for measure in measures:
        columns += [measure, "each seed"]
    rows = []
    for name, base in values["bases"].items():
        scores = [text for measure in measures for text in (number(base.get(measure), f".{DIGITS[measure]}f"), "")]
        rows.append([name, "", *scores, *(number(base.get(one), ".3f") for one in beside)])
    for arm in values["arms"]:
        cells = [arm["arm"], f"{arm['learning_rate']:g}"]
        for measure in measures:
            form = f".{DIGITS[measure]}f"
            seeds = arm["seeds"][measure]
            spread = f" \N{PLUS-MINUS SIGN} {np.std(seeds, ddof=1):{form}}" if len(seeds) > 1 else ""
            cells += [number(arm[measure], form) + spread, ", ".join(number(seed, form) for seed in seeds)]
        rows.append([*cells, *("" for _ in beside)])
    figures = [by_rank(values, measure, *TITLES[measure]) for measure in measures]
    caption = "Means over tasks and seeds; \N{PLUS-MINUS SIGN} is the standard deviation over seeds"
    return [Figures(figures), Table([*columns, *beside], rows, caption)]


def _differences(values: Values, measures: list[str]) -> list[Part]:
    pairs: list[Values] = values["differences"]
    if not pairs:
        return []
    figures = []
    for rank in sorted({pair["rank"] for pair in pairs}, key=lambda rank: rank or 0):
        some = [pair for pair in pairs if pair["rank"] == rank]
        for measure in measures:
            rows = [_interval(pair, measure, rank) for pair in some]
            title = f"{measure.capitalize()}" + (f", rank {rank}" if rank else "")
            side = "left" if LOWER_IS_BETTER[measure] else "right"
            figures.append(forest(f"forest-{measure}-{rank}", title, f"{side} of zero the first is better", rows))
    columns = ["difference", *(title for measure in measures for title in (measure, f"{COVERAGE:.0%} interval"))]
    rows_of_table = []
    for pair in pairs:
        cells = [pair["label"].replace(" - ", f" {MINUS} ")]
        for measure in measures:
            one, form = pair[measure], f"+.{DIGITS[measure]}f"
            cells += [number(one["mean"], form), f"{number(one['low'], form)} to {number(one['high'], form)}"]
        rows_of_table.append(cells)
    caption = f"Paired by seed and sample; {values['interval']}"
    return [Figures(figures), Table(columns, rows_of_table, caption)]


def _interval(pair: Values, measure: str, rank: int | None) -> Interval:
    one = pair[measure]
    color = {"better": GREEN, "worse": ORANGE, "same": GREY}[verdict(one, LOWER_IS_BETTER[measure])]
    label = pair["label"].replace(f" r={rank}", "").replace(" - ", f" {MINUS} ")
    return Interval(label, one["mean"], one["low"], one["high"], color, one["seeds"])


def _search(values: Values) -> list[Part]:
    methods = {arm["arm"]: arm["method"] for arm in values["arms"]}
    found: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for tried in values["search"]:
        loss = tried["eval_loss"]
        if tried["arm"] in methods and loss is not None and math.isfinite(loss):
            arms = found.setdefault(methods[tried["arm"]], {})
            arms.setdefault(tried["arm"], []).append((tried["learning_rate"], loss))
    figures = [
        search(f"search-{place}", method, arms, look(values, method)[0])
        for place, (method, arms) in enumerate(found.items())
        if max(map(len, arms.values())) > 1
    ]
    if not figures:
        return []
    about = (
        "The loss on data.eval after training with the first seed; the ringed learning rate was taken for all seeds."
    )
    return [Text(about), Figures(figures)]


def _compared(values: Values) -> Iterator[tuple[Values, int, str]]:
    """Each arm with a seed, and the name of that run."""
    for arm in values["arms"]:
        for seed in values["config"]["seeds"]:
            yield arm, seed, Cell(Arm(arm["method"], arm["rank"]), arm["learning_rate"], seed).name


def _curves(values: Values, runs: dict[str, Values]) -> list[Part]:
    ranks = sorted({arm["rank"] for arm in values["arms"] if arm["rank"] is not None}) or [None]
    figures: list[Figure] = []
    for rank in ranks:
        lines = [
            (arm["arm"], *look(values, arm["method"]), runs[name]["metrics"])
            for arm, _, name in _compared(values)
            if arm["rank"] in (rank, None) and any("loss" in record for record in runs.get(name, {}).get("metrics", []))
        ]
        if lines:
            title = "Full fine-tuning" if rank is None else f"Rank {rank}"
            figures.append(training_curves(f"training-{rank}", title, lines))
    return [Figures(figures)] if figures else []


def _cost(values: Values) -> list[Part]:
    rows = []
    for arm in values["arms"]:
        runs = arm["training"]
        speeds = [run["tokens_per_second"] for run in runs if run.get("tokens_per_second") is not None]
        peaks = [run["peak_memory_gib"] for run in runs if run.get("peak_memory_gib") is not None]
        tokens = [run["num_tokens"] for run in runs if run.get("num_tokens") is not None]
        rows.append(
            [
                arm["arm"],
                number(runs[0].get("num_trainable_parameters"), ",") if runs else DASH,
                number(float(np.mean(tokens)), ",.0f") if tokens else DASH,
                number(max(peaks), ".2f") if peaks else DASH,
                number(float(np.mean(speeds)), ",.0f") if speeds else DASH,
            ]
        )
    columns = ["", "trained parameters", "tokens a run", "peak memory, GiB", "tokens/s"]
    return [Table(columns, rows, "Tokens and tokens/s are means over seeds, memory the highest of them")]


def _runs(values: Values, folder: Path, beside: Path) -> list[Part]:
    rows: list[list[str | Link]] = []
    compared = {name for _, _, name in _compared(values)}
    losses = {tried["folder"]: tried for tried in values["search"]}
    for name in [*compared.difference(losses), *losses]:
        tried = losses.get(name, {})
        if (folder / name).is_dir():
            path = Path(os.path.relpath((folder / name).resolve(), beside.resolve())).as_posix()
            href = f"./{quote(path)}/"  # the dot, as a name may look like a scheme
            cells = [number(tried.get("eval_loss"), ".4f"), "yes" if name in compared else "no"]
            rows.append([Link(name, href), *cells])
    rows.sort(key=lambda row: row[0].text if isinstance(row[0], Link) else "")
    return [Table(["run", "held-out loss in the search", "compared"], rows)] if rows else []


def _options(values: Values) -> list[Part]:
    rows = [[name, shown(value)] for name, value in flatten(values["config"]).items()]
    methods = [
        [name, NAMES[own["adapter"]], *(shown(own[key]) for key in ("quant", "dequantised", "ranks", "learning_rates"))]
        for name, own in values["config"]["methods"].items()
    ]
    columns = ["method", "adapter", "quant", "dequantised", "own ranks", "learning rates"]
    others = Table(["option", "value"], rows, words=True)
    return [Table(columns, methods, words=True), Folded(f"All {len(rows)} options", [others])]


def _commands(values: Values, folder: Path) -> list[Part]:
    again = command("qdora report", [option("study", str(folder))])
    return [Commands([study_command(values["config"]), again])]


def _versions(runs: dict[str, Values]) -> list[Part]:
    summaries = [run["summary"] for run in runs.values() if "versions" in run.get("summary", {})]
    found = {(str(one.get("device")), *one["versions"].items()): None for one in summaries}
    return [Facts([("Device", device), *versions]) for device, *versions in found]

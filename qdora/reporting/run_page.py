"""The page of a run, from the files in its folder."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qdora import checkpoint_folder
from qdora.config import AdapterMethod, QuantMethod, RunConfig
from qdora.config.values import config_values, flatten, option
from qdora.files import read_json
from qdora.reporting.curves import logged_steps
from qdora.reporting.figures import Interval, forest, run_curves
from qdora.reporting.page import (
    DASH,
    Z_95,
    Answer,
    Answers,
    Commands,
    Facts,
    Figures,
    Folded,
    Page,
    Part,
    Section,
    Table,
    Text,
    gib,
    interval,
    number,
    png,
)
from qdora.reporting.reproduce import changed_options, follow_up_commands, train_command
from qdora.run_folder import RunFolder

Values = dict[str, Any]
NAMES = {"dora": "DoRA", "lora": "LoRA", "vera": "VeRA", "dvora": "DVoRA", "none": "full fine-tuning"}
PICTURES = {
    "decomposition.png": "Change of magnitude over change of direction, a point a layer and step",
    "layers.png": "Effective rank of the update, and quantisation error, over the blocks",
}


def run_page(folder: RunFolder, answers: Sequence[Answer], answered_at: int | None = None) -> Page:
    """All that the folder of a run tells; what is not there is left out.

    Args:
        answered_at: the step whose checkpoint answered, where the run is not finished.

    Raises:
        ConfigError: there is no run in the folder.
    """
    config = folder.read_config()
    summary = read_json(folder.summary)
    records = logged_steps(folder.metrics)
    found = {path.parent.name: read_json(path) for path in sorted(folder.path.glob("*/results.json"))}
    evaluations = {name: results for name, results in found.items() if {"protocol", "tasks"} <= {*results}}
    for name in found.keys() - evaluations.keys():
        print(f"{folder.path / name}/results.json holds no scores that can be read: it is left out", flush=True)
    facts = _facts(config, summary, records)
    told = [f"{name} {value}" for name, value in facts if name not in ("Run", "Seed")]
    sections = [
        Section("overview", "Overview", [Facts(facts), *_unfinished(summary)]),
        Section("curves", "Training", [Figures(run_curves(records))] if records else []),
        Section("scores", "Scores", _scores(evaluations)),
        Section("answers", "Answers before and after", _answers(answers, answered_at)),
        Section("weights", "How the weights changed", _analysis(folder)),
        Section("memory", "Memory and speed", _ranks(summary)),
        Section("options", "Options", [*_options(config), *_changes(folder)]),
        Section("commands", "Commands", _commands(folder, config, summary, evaluations)),
        Section("versions", "Versions and machine", _versions(summary)),
    ]
    title = f"{folder.path.resolve().name}: {method_name(config)} on {Path(str(config.model.path)).name}"
    return Page(title, " \N{MIDDLE DOT} ".join(told), sections)


def method_name(config: RunConfig) -> str:
    """As papers call it."""
    name = NAMES[config.adapter.method.name]
    return f"Q{name}" if config.quant.method is QuantMethod.nf4 else name


def _facts(config: RunConfig, summary: Values, records: list[Values]) -> list[tuple[str, str]]:
    pairs = [("Model", str(config.model.path)), ("Method", method_name(config))]
    if config.adapter.method is not AdapterMethod.none:
        pairs.append(("Rank", str(config.adapter.rank)))
    pairs.append(("Base weights", "NF4" if config.quant.method is QuantMethod.nf4 else config.model.dtype.name))
    last = {name: value for record in records for name, value in record.items()}
    steps, tokens = summary.get("steps", last.get("step")), summary.get("num_tokens", last.get("num_tokens"))
    if steps is not None:
        pairs.append(("Steps", f"{steps:,}"))
    if tokens is not None:
        pairs.append(("Tokens trained", f"{tokens:,}"))
    losses = [record["eval_loss"] for record in records if record.get("eval_loss") is not None]
    losses = list(summary.get("eval_losses", {}).values()) or losses
    if losses:
        ends = [losses[0], losses[-1]] if len(losses) > 1 else losses
        pairs.append(("Held-out loss", " \N{RIGHTWARDS ARROW} ".join(number(loss, ".4f") for loss in ends)))
    if peaks := summary.get("peak_memory_gib"):
        pairs.append(("Peak memory", f"{max(peaks):.2f} GiB"))
    if (speed := summary.get("tokens_per_second")) is not None:
        pairs.append(("Tokens/s", f"{speed:,.0f}"))
    return [*pairs, ("Seed", str(config.seed)), ("Run", str(config.run_id))]


def _unfinished(summary: Values) -> list[Part]:
    if summary.get("status") == "finished":
        return []
    return [Text(f"This run has not finished; its status is {summary.get('status', 'not known yet')}.")]


def _answers(answers: Sequence[Answer], answered_at: int | None) -> list[Part]:
    if not answers:
        return []
    told = [] if answered_at is None else [Text(f"After: by the checkpoint of step {answered_at}.")]
    return [*told, Answers(answers)]


def _scores(evaluations: dict[str, Values]) -> list[Part]:
    parts: list[Part] = []
    for name, results in evaluations.items():
        tasks: dict[str, Values] = results["tasks"]
        has_mean = len(tasks) > 1 and "num_samples" in results
        lines = [*tasks.items(), *([("mean", results)] if has_mean else [])]
        columns = [key for key in SCORES if any(scores.get(key) is not None for _, scores in lines)]
        others = {key: None for scores in tasks.values() for key in _of_harness(scores)}
        rows = [
            [
                task,
                *(SCORES[key][1](scores) for key in columns),
                *(number(_of_harness(scores).get(key), ".3f") for key in others),
            ]
            for task, scores in lines
        ]
        caption = ". ".join([f"{name}: protocol {results['protocol']}", *results.get("notes", [])])
        parts.append(Table(["task", *(SCORES[key][0] for key in columns), *others], rows, caption))
        intervals = [_interval(task, scores) for task, scores in lines if scores.get("standard_error") is not None]
        if intervals:
            title = "Accuracy (\N{MULTIPLICATION SIGN} chance, \N{WHITE DIAMOND} majority)"
            parts.append(Figures([forest(f"scores-{len(parts)}", title, f"{name}", intervals, zero=False)]))
    if any("standard_error" in scores for results in evaluations.values() for scores in results["tasks"].values()):
        parts.append(
            Text(
                "\N{PLUS-MINUS SIGN} is half of a 95 % interval, 1.96 standard errors over samples: of another set of "
                "questions, not of another run. chance is guessing, majority always the most frequent answer."
            )
        )
    return parts


def _of_harness(scores: Values) -> Values:
    """What lm-evaluation-harness measured besides the accuracy, which stands under qdora's own name."""
    own: Values = scores["harness"] if isinstance(scores.get("harness"), dict) else {}
    return {name: value for name, value in own.items() if not name.startswith("acc") and "stderr" not in name}


def _accuracy(scores: Values) -> str:
    error = scores.get("standard_error")
    return interval(scores.get("accuracy"), None if error is None else Z_95 * error, ".3f")


def _interval(task: str, scores: Values) -> Interval:
    accuracy, half = scores["accuracy"], Z_95 * scores["standard_error"]
    marks = [
        (marker, scores[key]) for key, marker in (("chance", "x"), ("majority", "D")) if scores.get(key) is not None
    ]
    return Interval(task, accuracy, max(0.0, accuracy - half), min(1.0, accuracy + half), marks=marks)


SCORES: dict[str, tuple[str, Any]] = {
    "accuracy": ("accuracy", _accuracy),
    "accuracy_normalised": ("by length", lambda scores: number(scores.get("accuracy_normalised"), ".3f")),
    "chance": ("chance", lambda scores: number(scores.get("chance"), ".3f")),
    "majority": ("majority", lambda scores: number(scores.get("majority"), ".3f")),
    "loss": ("loss", lambda scores: number(scores.get("loss"), ".4f")),
    "num_samples": ("samples", lambda scores: number(scores.get("num_samples"), ",")),
}
"""Title of a column, and what is in it."""


def _analysis(folder: RunFolder) -> list[Part]:
    path = folder.path / "analysis" / "analysis.json"
    results = read_json(path)
    if "projections" not in results:
        if path.exists():
            print(f"{path} holds no analysis that can be read: it is left out", flush=True)
        can_be = folder.is_finished() or checkpoint_folder.complete(folder.checkpoints)
        return [Text(f"Not analysed yet: qdora analyze {option('run', str(folder.path))}")] if can_be else []
    columns = {
        "num_layers": ("layers", "d"),
        "magnitude_change": ("dM", ".3g"),
        "direction_change": ("dD", ".3g"),
        "slope": ("slope", "+.3g"),
        "correlation": ("correlation", "+.2f"),
        "effective_rank": ("effective rank", ".1f"),
        "stable_rank": ("stable rank", ".1f"),
        "quantisation_error": ("NF4 error", ".2%"),
    }
    rows = [
        [name, *(number(row.get(key), form) for key, (_, form) in columns.items())]
        for name, row in [*results["projections"].items(), ("all", results["all"])]
    ]
    files = {folder.path / "analysis" / name: text for name, text in PICTURES.items()}
    pictures = [png(path, text, text) for path, text in files.items() if path.exists()]
    caption = (
        f"Magnitude (dM), direction (dD) and ranks of the update: means at step {results['last_step']}; slope and "
        "correlation of dM over dD: all steps"
    )
    table = Table(["projection", *(title for title, _ in columns.values())], rows, caption)
    return [Figures(pictures, wide=True), table] if pictures else [table]


def _ranks(summary: Values) -> list[Part]:
    peaks, weights = summary.get("peak_memory_gib", []), summary.get("weight_bytes_per_rank", [])
    if not peaks:
        return []
    speed = summary["tokens_per_second"]
    rows = [
        [f"rank {rank}", number(peak, ".2f"), gib(held), number(speed / len(peaks), ",.0f")]
        for rank, (peak, held) in enumerate(zip(peaks, weights, strict=True))
    ]
    if len(peaks) > 1:
        rows.append(["all", number(max(peaks), ".2f"), gib(summary["weight_bytes_total"]), number(speed, ",.0f")])
    facts = [
        ("Trained parameters", f"{summary['num_trainable_parameters']:,}"),
        ("Loading", f"{summary['load_s']:.1f} s"),
        ("Waiting for checkpoints", f"{summary['checkpoint_stall_s']:.1f} s"),
    ]
    return [Facts(facts), Table(["", "peak memory, GiB", "weights", "tokens/s"], rows)]


def _options(config: RunConfig) -> list[Part]:
    changed = changed_options(config)
    rest = {name: value for name, value in flatten(config_values(config)).items() if name not in changed}
    tables = [
        Table(["option", "value"], [[name, shown(value)] for name, value in some.items()], words=True)
        for some in (changed, rest)
    ]
    return [tables[0], Folded(f"{len(rest)} options at their defaults", [tables[1]])]


def _changes(folder: RunFolder) -> list[Part]:
    """What the run had otherwise before it was resumed: the options are those of its last start."""
    changes = folder.read_changes()
    if not changes:
        return []
    rows = [[str(one.from_step), one.option, shown(one.before), shown(one.now)] for one in changes]
    caption = "Changed when the run was resumed: one command with the options above does not make the same run"
    return [Table(["from step", "option", "before", "then"], rows, caption, words=True)]


def shown(value: Any) -> str:
    """The value of an option, as YAML has it."""
    if isinstance(value, list):
        return f"[{', '.join(map(shown, value))}]"
    if isinstance(value, float):
        return f"{value:g}" if math.isfinite(value) else DASH
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _commands(folder: RunFolder, config: RunConfig, summary: Values, evaluations: dict[str, Values]) -> list[Part]:
    path: Path = folder.path
    first = train_command(config, int(summary.get("world_size", 1)))
    return [Commands([first, *follow_up_commands(path, config, evaluations)])]


def _versions(summary: Values) -> list[Part]:
    if "versions" not in summary:
        return []
    machine = [("Device", str(summary.get("device"))), ("Ranks", str(summary.get("world_size")))]
    return [Facts([*machine, *summary["versions"].items()])]

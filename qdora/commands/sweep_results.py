"""What a sweep ends in: sweep.json, a table, and a figure (`qdora.commands.sweep_figure`)."""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from qdora.errors import EXIT_ERROR, EXIT_PREEMPTED
from qdora.files import write_durably

RECORDS = ".members"
"""Folder of the records, in that of the sweep."""
MEASURED = ("steps", "eval_loss", "last_loss", "tokens_per_second")
"""Of a run's summary."""


@dataclass(kw_only=True, slots=True)
class Member:
    """How one run of the sweep ended."""

    number: int
    """Its place in the sweep, from 0."""
    overrides: dict[str, str]
    """What it does not share with the others."""
    folder: str
    status: str = "lost"
    """`finished`, `preempted` (goes on with the same command), `failed`, `not started`; `lost` from its start until it
    ends: what is left where its launcher was killed."""
    exit_status: int | None = None
    message: str | None = None
    """Why it was not even started."""
    seconds: float = 0.0
    """Time of all its starts."""

    def write(self, path: Path) -> None:
        """Replaces the record at `path`."""
        write_durably(path, json.dumps(asdict(self)))


def conclude(folder: Path, shared: list[str], began: float) -> int:
    """Writes and shows what the sweep in `folder` has come to; returns the exit status of the first run that failed.

    `shared`: the options of all runs. Only records since the time `began` count: others are of sweeps before.
    """
    files = [file for file in (folder / RECORDS).glob("*.json") if file.stat().st_mtime >= began]
    records = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    members = [member | _measured(Path(member["folder"])) for member in sorted(records, key=lambda one: one["number"])]
    if not members:
        return 0
    finished = [member for member in members if member["status"] == "finished" and math.isfinite(final_loss(member))]
    best = min(finished, key=final_loss, default=None)
    values = {"options": shared, "best": best and best["folder"], "members": members}
    write_durably(folder / "sweep.json", json.dumps(values, indent=2) + "\n")
    _show(folder, members)
    if best is not None:
        from qdora.commands.sweep_figure import draw  # here, as its libraries take seconds and half a GiB a worker

        draw(folder / "sweep.png", folder.name, members)
        print(f"best: {best['folder']}\nfigure: {folder / 'sweep.png'}", flush=True)
    failed = [member for member in members if member["status"] not in ("finished", "preempted", "not started")]
    if failed:
        return int(failed[0]["exit_status"] or EXIT_ERROR)
    return 0 if all(member["status"] == "finished" for member in members) else EXIT_PREEMPTED


def _measured(folder: Path) -> dict[str, Any]:
    """What the run has measured, as far as it has come."""
    summary: dict[str, Any] = {}
    if (folder / "summary.json").exists():
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    summary["eval_loss"] = next(reversed(summary.get("eval_losses", {}).values()), None)
    return {name: summary.get(name) for name in MEASURED}


def final_loss(member: dict[str, Any]) -> float:
    """What runs are compared by: the loss on held-out data where there is any. Not a number where there is none."""
    loss = member["last_loss"] if member["eval_loss"] is None else member["eval_loss"]
    return float("nan") if loss is None else float(loss)


def options_of(members: list[dict[str, Any]]) -> list[str]:
    """The options in which the runs differ."""
    return list(dict.fromkeys(key for member in members for key in member["overrides"]))


def bare(option: str) -> str:
    """Its name without what Hydra's grammar puts before it."""
    return option.lstrip("+~")


def short(option: str) -> str:
    """Its name without its group."""
    return bare(option).rpartition(".")[2]


def _show(folder: Path, members: list[dict[str, Any]]) -> None:
    options = options_of(members)
    table = Table(title=f"sweep {folder}", title_justify="left", title_style="bold")
    for option in options:
        table.add_column(short(option), style="cyan", overflow="fold")
    table.add_column("status", no_wrap=True)
    for title in ("eval loss", "loss", "tokens/s", "time"):
        table.add_column(title, justify="right", no_wrap=True)
    forms = {"eval_loss": ".4f", "last_loss": ".4f", "tokens_per_second": ",.0f", "seconds": ",.0f"}
    for member in members:
        code = f" ({member['exit_status']})" if member["status"] == "failed" else ""
        numbers = ["" if member[name] is None else format(member[name], form) for name, form in forms.items()]
        numbers[-1] += " s"
        values = [member["overrides"].get(option, "") for option in options]
        table.add_row(*map(Text, [*values, member["status"] + code, *numbers]))
    Console(highlight=False).print(table)

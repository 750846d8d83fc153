"""The whole benchmark on this machine: every case, repeated, peak memory in a process of its own, a table and a figure.

    python benchmarks/run.py [--output benchmarks/results/NAME] [--short] [--tiny]

On a CPU SmolLM2-135M, on a GPU random weights of Llama-3's shapes. Writes NAME.json and NAME.png. `--tiny` runs the
GPU's cases on a model of toy size, whatever the device is: it shows that they run, its figures mean nothing.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from arms import ARMS, QUANTISED
from matplotlib.figure import Figure
from provenance import provenance
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
REPEATS = 3
BASELINES = ("peft-lora", "peft-qlora", "peft-qdora", "qlora")
TIMEOUT_S = 3600


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One case; the fields are options of step.py, `ranks` and `arms` apart."""

    model: str
    tokens: int = 1024
    length: int = 256
    rank: int = 16
    recomputation: str = "none"
    accumulation: int = 1
    ranks: int = 1
    arms: tuple[str, ...] = ARMS

    @property
    def title(self) -> str:
        """For people."""
        ranks = f"{self.ranks} ranks, " if self.ranks > 1 else ""
        return (
            f"{Path(self.model).name}: {ranks}{self.tokens} tokens in rows of {self.length}, rank {self.rank}, "
            f"recomputation {self.recomputation}, accumulation {self.accumulation}"
        )


def jobs(use_gpu: bool, tiny: bool, short: bool) -> list[Job]:
    """Every case: on a CPU the real small model; on a GPU one option varied at a time (or two cases a shape)."""
    if not (use_gpu or tiny):
        model = "models/SmolLM2-135M-Instruct"
        return [Job(model=model), Job(model=model, ranks=2, arms=QUANTISED)]
    lengths = {64: 32, 128: 64, 256: 64} if tiny else {1024: 1024, 4096: 2048, 16384: 4096}
    small, middle, large = lengths
    found = []
    for shape in ("tiny",) if tiny else ("llama-3-8b", "llama-3.2-1b"):
        base: dict[str, Any] = {"model": f"models/random-{shape}", "arms": QUANTISED}
        base |= {"tokens": middle, "length": lengths[middle], "recomputation": "full"}
        # Few arms over bfloat16 beside each other: their weights are 4 times as large.
        variants: list[dict[str, Any]] = [{}, {"arms": ("peft-lora", "dora", "qdora")}]
        variants += [{"tokens": tokens, "length": lengths[tokens]} for tokens in (small, large)]
        variants += [{"rank": 64}, {"recomputation": "none"}, {"accumulation": 4}]
        variants += [{"recomputation": "selective", "arms": ("qlora", "qdora", "qdora-compiled")}]  # PEFT has none
        if short:
            base["arms"] = tuple(arm for arm in QUANTISED if arm != "qdora-compiled")  # which takes a minute to compile
            variants = [{}, {"tokens": small, "length": lengths[small], "recomputation": "none"}]
        found += [Job(**(base | variant)) for variant in variants]
    return found


def run_step(job: Job, arms: tuple[str, ...], steps: int) -> dict[str, Any] | None:
    """What step.py writes of `arms`, or None where they do not fit the memory."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "steps.json"
        options = {"model": job.model, "output": output, "steps": steps}
        options |= {name: getattr(job, name) for name in ("tokens", "length", "rank", "recomputation", "accumulation")}
        command = [sys.executable]
        if job.ranks > 1:
            command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={job.ranks}"]
        command += [str(HERE / "step.py"), "--arms", *arms]
        command += [part for name, value in options.items() for part in (f"--{name}", str(value))]
        threads = str(max(1, (os.cpu_count() or 1) // job.ranks))
        environment = os.environ | {"GOMP_SPINCOUNT": "10000", "OMP_NUM_THREADS": threads}  # as qdora
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
        if done.returncode and "OutOfMemoryError" in done.stderr:
            return None
        if done.returncode:
            raise SystemExit(f"{' '.join(command)}\n{done.stdout}\n{done.stderr}")
        return json.loads(output.read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def run_job(job: Job, repeats: int, steps: int) -> dict[str, Any]:
    """All arms of a case: `repeats` processes with the arms in turn, then one process an arm for its peak memory."""
    runs = [run for run in (run_step(job, job.arms, steps) for _ in range(repeats)) if run]
    alone = {name: run_step(job, (name,), 1) for name in job.arms}
    arms: dict[str, Any] = {}
    for name in job.arms:
        parts = [run["results"][name] for run in runs]
        seconds = [part["seconds"] for part in parts if part and part["seconds"]]
        every = [value for part in seconds for value in part]
        bounds = [run["bounds"][name] for run in runs if name in run["bounds"]]
        peak = alone[name]
        arms[name] = {
            "median_s": statistics.median(every) if every else None,
            "spread_s": [min(every), max(every)] if every else None,
            "seconds": seconds,
            "losses": parts[0]["losses"] if parts and parts[0] else None,
            "bound_s": statistics.median(bounds) if bounds else None,
            "peak_bytes": peak["peak_bytes"] if peak else None,
        }
    some = next((run for run in (*runs, *alone.values()) if run), {"device": None, "rates": None})
    return {"title": job.title, **asdict(job), "device": some["device"], "rates": some["rates"], "results": arms}


def ratio(case: dict[str, Any], name: str, other: str, key: str = "median_s") -> float | None:
    """One arm's figure over another's."""
    one, base = case["results"][name][key], case["results"].get(other, {}).get(key)
    return one / base if one and base else None


def print_table(case: dict[str, Any], console: Console) -> None:
    """One case, an arm a row."""
    table = Table(title=f"{case['title']} ({case['device']})", title_justify="left")
    for column in ("arm", "s a step", "spread", "peak GiB", "bound s", "of it"):
        table.add_column(column, justify="left" if column == "arm" else "right")
    others = [name for name in BASELINES if name in case["results"]]
    for name in others:
        table.add_column(f"/ {name}", justify="right")
    for name, result in case["results"].items():
        bound, median = result["bound_s"], result["median_s"]
        table.add_row(
            name,
            f"{median:.3f}" if median else "not beside the others" if result["peak_bytes"] else "out of memory",
            f"{result['spread_s'][0]:.3f}-{result['spread_s'][1]:.3f}" if median else "",
            f"{result['peak_bytes'] / 2**30:.2f}" if result["peak_bytes"] else "",
            f"{bound:.3f}" if bound else "",
            f"{bound / median:.0%}" if bound and median else "",
            *(f"{value:.2f}" if (value := ratio(case, name, other)) else "" for other in others),
        )
    console.print(table)


def draw(cases: list[dict[str, Any]], path: Path) -> None:
    """Step time (with its bound) and peak memory of each arm, a row a case."""
    figure = Figure(figsize=(9, 2.6 * len(cases)), layout="constrained")
    axes = figure.subplots(len(cases), 2, squeeze=False)
    for (left, right), case in zip(axes, cases, strict=True):
        names = list(case["results"])
        colors = ["tab:gray" if name.startswith("peft") else "tab:blue" for name in names]
        results = case["results"].values()
        left.barh(names, [result["median_s"] or 0 for result in results], color=colors)
        for place, result in enumerate(results):
            if result["bound_s"]:
                left.plot([result["bound_s"]] * 2, [place - 0.4, place + 0.4], color="black")
        right.barh(names, [(result["peak_bytes"] or 0) / 2**30 for result in results], color=colors)
        left.set(xlabel="seconds a step (line: the bound)", title=case["title"].partition(", recomp")[0])
        right.set(xlabel="peak memory, GiB", yticks=[])
        left.title.set_fontsize(8)
        for axis in (left, right):
            axis.invert_yaxis()
            axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Runs every case, prints and writes after each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=HERE / "results" / f"step-{time.strftime('%Y-%m-%d')}")
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--short", action="store_true", help="on a GPU two cases a shape instead of eight")
    parser.add_argument("--tiny", action="store_true", help="the GPU's cases on a toy model")
    options = parser.parse_args()

    use_gpu = torch.cuda.is_available()
    record: dict[str, Any] = provenance() | {"cases": []}
    console = Console(highlight=False, width=120)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    for job in jobs(use_gpu, options.tiny, options.short):
        record["cases"].append(run_job(job, options.repeats, options.steps))
        print_table(record["cases"][-1], console)
        options.output.with_suffix(".json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        draw(record["cases"], options.output.with_suffix(".png"))
    if not use_gpu:
        console.print("No GPU on this machine: there are no GPU figures.")


if __name__ == "__main__":
    main()

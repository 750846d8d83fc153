"""Repeats runs of a study with checkpoints, at the learning rates that it found best, and analyses their weights.

    python benchmarks/weights.py outputs/study-math --output outputs/study-math-weights [--jobs 4]

Leaves OUTPUT/METHOD/analysis of each method, which `qdora report run=OUTPUT/METHOD` shows too, and of all
OUTPUT/decomposition.png and OUTPUT/weights.json.gz.
"""

import argparse
import gzip
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from qdora.analysis.figures import draw_methods
from qdora.analysis.report import Results
from qdora.config.commands import written
from qdora.reporting.reproduce import changed_options
from qdora.run_folder import RunFolder
from qdora.study.cells import Arm, Cell

METHODS = ("full", "lora", "dora", "qdora")
NUM_CHECKPOINTS = 5


def run_of(arm: dict[str, Any], seed: int, study: Path) -> Path:
    """The folder of an arm's run with the seed."""
    return study / Cell(Arm(arm["method"], arm["rank"]), arm["learning_rate"], seed).name


def repeat(run: Path, output: Path) -> None:
    """Trains with the options of `run` again, keeping checkpoints, and analyses.

    Raises:
        SystemExit: the run is too short, or has not the checkpoints that it should, as after an interruption.
    """
    config = RunFolder(run).read_config()
    if config.train.num_steps is None or config.train.num_steps < NUM_CHECKPOINTS:
        raise SystemExit(f"{run}: train.num_steps={config.train.num_steps} is not {NUM_CHECKPOINTS} at least")
    every = config.train.num_steps // NUM_CHECKPOINTS
    options = {name: value for name, value in changed_options(config).items() if name != "run_id"}
    options |= {"output_dir": str(output), "data.eval": None}
    options |= {"train.checkpoint_every": every, "train.keep_checkpoints": NUM_CHECKPOINTS}
    given = [f"{name}={written(value)}" for name, value in options.items()]
    command = [sys.executable, "-m", "qdora"]
    threads = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}  # as study.sh
    run_command = partial(subprocess.run, check=True, env={**os.environ, **threads})
    run_command([*command, "train", *given])
    if not (output / "analysis/analysis.json").exists():
        run_command([*command, "analyze", f"run={output}"])
    steps = [state["step"] for state in analysis(output)["states"]]
    if steps != [*range(every, config.train.num_steps + 1, every)]:
        raise SystemExit(
            f"{output} was analysed at the steps {steps}, not at every {every}th: remove it and start again"
        )


def analysis(run: Path) -> Results:
    """What was found of the run."""
    results: Results = json.loads((run / "analysis/analysis.json").read_text(encoding="utf-8"))
    return results


def main() -> None:
    """All of `METHODS`, of the adapters that with the lowest rank."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    options = parser.parse_args()
    results = json.loads((options.study / "study.json").read_text(encoding="utf-8"))
    seed = results["config"]["seeds"][0]
    chosen = {
        arm["method"]: arm for arm in sorted(results["arms"], key=lambda arm: -(arm["rank"] or 0))
    }  # the last one stays
    methods = [method for method in METHODS if method in chosen]
    with ThreadPoolExecutor(options.jobs) as pool:
        done = [
            pool.submit(partial(repeat, run_of(chosen[method], seed, options.study), options.output / method))
            for method in methods
        ]
        for one in done:
            one.result()
    analyses = [analysis(options.output / method) for method in methods]
    ranks = sorted({chosen[method]["rank"] for method in methods} - {None})
    told = f", rank {', '.join(map(str, ranks))}" if ranks else ""
    heading = f"{Path(results['config']['model']['path']).name}{told}: all layers at all checkpoints"
    draw_methods(analyses, heading, options.output / "decomposition.png")
    with gzip.open(options.output / "weights.json.gz", "wt", encoding="utf-8") as file:
        json.dump(analyses, file)


if __name__ == "__main__":
    main()

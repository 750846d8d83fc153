"""`qdora analyze`: how training changed each layer's magnitudes and directions, and how many directions it used.

The analysis of DoRA (arXiv:2402.09353, section 3.2 and figure 2) for a run of one's own, over its layers and
checkpoints. There full fine-tuning and DoRA have a negative slope of dM over dD, and LoRA a positive one: what it turns
it stretches. One layer is in memory at a time: W_0, an update, and what its singular values need.
"""

import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from qdora import parallel
from qdora.analysis.course import Course, State, find_course
from qdora.analysis.figures import draw_decomposition, draw_layers
from qdora.analysis.measures import product_singular_values, ranks, row_changes
from qdora.analysis.report import RESULTS, show, summarise, write_json
from qdora.config import AnalyzeConfig
from qdora.errors import CheckpointError, ConfigError
from qdora.model.writer import CHUNK_NUMEL, Rows


@torch.no_grad()
def analyze(config: AnalyzeConfig) -> int:
    """Analyses the run, prints a table, writes analysis.json and two figures; returns the exit status.

    Raises:
        QdoraError: the run, its base or its adapter cannot be used, or the output not be written.
    """
    world = parallel.start_alone("qdora analyze")
    started = time.perf_counter()
    course = find_course(config, world)
    output = Path(config.output_dir) if config.output_dir else course.run.path / "analysis"
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"output_dir={output} cannot be made: {error.strerror}") from None
    console = Console(highlight=False)
    layers: list[dict[str, Any]] = []
    points: list[dict[str, Any]] = []
    for name in track([*course.layers], "layers", console=console, transient=True, disable=not console.is_terminal):
        layer, own = measure_layer(course, name, config.effective_rank)
        layers.append(layer)
        points += own
    results = summarise(course, layers, points)
    try:
        write_json(results, output / RESULTS)
        draw_decomposition(results, output / "decomposition.png")
        draw_layers(results, output / "layers.png")
    except OSError as error:
        raise ConfigError(f"output_dir={output} cannot be written: {error.strerror}") from None
    show(results, console)
    print(f"{len(layers)} layers at {len(course.states)} steps in {time.perf_counter() - started:.1f} s")
    if len(course.states) == 1:
        print(
            "only one step is there, and slope and correlation are over layers alone: train with "
            "train.checkpoint_every=N and a larger train.keep_checkpoints for points of several steps"
        )
    print(f"written to {output}: {RESULTS}, decomposition.png, layers.png")
    return 0


def measure_layer(course: Course, name: str, with_ranks: bool) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What is known of a layer by itself, and of it at each step."""
    out, width = course.shape(name)
    before = torch.empty(out, width, device=course.weights.world.device)
    base = course.before(name)
    for first, last in _chunks(before):
        before[first:last] = base(first, last)
    about = {"layer": name, "projection": name.rpartition(".")[2], "block": _block(name)}
    error = quantisation_error(before, course.original(name))
    layer = {**about, "shape": [out, width], "quantisation_error": error}
    return layer, [
        {**about, "step": state.step, **measure_state(state, name, before, with_ranks)} for state in course.states
    ]


def measure_state(state: State, name: str, before: Tensor, with_ranks: bool) -> dict[str, float | None]:
    """The changes of a layer from `before` (out, in) to its weight at a step.

    A product of low-rank factors gives its singular values through these. What has a magnitude, or trained every
    weight, is an update of full rank: the singular values are those of the whole matrix, in float32.

    Raises:
        CheckpointError: a value is not finite.
    """
    factors = state.factors(name) if with_ranks else None
    update = torch.empty_like(before) if with_ranks and factors is None else None
    trained = state.rows(name, lambda first, last: before[first:last].clone())
    parts = []
    for first, last in _chunks(before):
        after = trained(first, last)
        if not after.isfinite().all():
            raise CheckpointError(f"{name} has values at step {state.step} that are not finite")
        parts.append(row_changes(before[first:last], after))
        if update is not None:
            torch.sub(after, before[first:last], out=update[first:last])
    magnitude, relative, direction = torch.cat(parts).nanmean(0).tolist()
    effective, stable = None, None
    if factors is not None:
        effective, stable = ranks(product_singular_values(*factors))
    elif update is not None:
        effective, stable = ranks(torch.linalg.svdvals(update))
    return {
        "magnitude_change": magnitude,
        "relative_magnitude_change": None if relative != relative else relative,
        "direction_change": None if direction != direction else direction,
        "effective_rank": effective,
        "stable_rank": stable,
    }


def quantisation_error(before: Tensor, original: Rows | None) -> float | None:
    """|| W - W_0 || / || W || (Frobenius) of W before it was quantised and W_0 after; None without W, or if it is 0."""
    if original is None:
        return None
    error = norm = 0.0
    for first, last in _chunks(before):
        rows = original(first, last).double()
        error += float((rows - before[first:last]).square().sum())
        norm += float(rows.square().sum())
    return float((error / norm) ** 0.5) if norm else None


def _chunks(matrix: Tensor) -> list[tuple[int, int]]:
    """First and last row of each part that is looked at together."""
    rows, width = matrix.shape
    step = max(1, CHUNK_NUMEL // width)
    return [(first, min(first + step, rows)) for first in range(0, rows, step)]


def _block(name: str) -> int | None:
    """The number of a layer's block."""
    return next((int(part) for part in name.split(".") if part.isdecimal()), None)

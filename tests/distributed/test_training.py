"""Inside a run: the norm is fresh after every step and computed once a step, and magnitudes move."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.marks import soak
from tests.support.models import make_model
from tests.support.processes import run_ranks

SCRIPT = Path(__file__).with_name("ranks_training.py")
NORM_TOLERANCE = 1e-5
"""Relative; the norm is a sum of 128 to 192 float32 squares, against float64."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few questions with answers of different lengths."""
    file = tmp_path_factory.mktemp("data") / "data.jsonl"
    rows = [{"prompt": f"{n} times {n} is", "completion": " " + str(n * n) * (1 + n % 5)} for n in range(40)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama."""
    return make_model(tmp_path_factory.mktemp("model"), "llama")


def _run(ranks: int, model: Path, data: Path, output: Path, **options: Any) -> list[dict[str, Any]]:
    settings = {"learning_rate": 1e-3, "num_steps": 4, "dtype": "float32", "checkpointing": "none", "method": "dora"}
    settings |= {"output_dir": str(output / "run"), **options}
    return run_ranks(SCRIPT, ranks, output, str(model), str(data), json.dumps(settings))


@pytest.mark.parametrize(("ranks", "method"), [(2, "dora"), *soak((1, "dora"), (2, "dvora"))])
def test_norm_is_fresh_after_every_step_and_after_resuming(
    ranks: int, method: str, model: Path, data: Path, tmp_path: Path
) -> None:
    first = _run(ranks, model, data, tmp_path, num_steps=4, method=method)
    resumed = _run(ranks, model, data, tmp_path, num_steps=6, method=method)
    for found in (*first, *resumed):
        assert max(found["stale_by"]) <= NORM_TOLERANCE
    assert [len(found["stale_by"]) for found in (first[0], resumed[0])] == [5, 3]  # at the start, and each step


def test_norm_is_computed_once_a_step(model: Path, data: Path, tmp_path: Path) -> None:
    """With 4 micro-batches a step and every block recomputed in its backward."""
    for found in _run(2, model, data, tmp_path, num_steps=3, checkpointing="full"):
        assert found["norm_calls"] == 3 * found["layers"]


@pytest.mark.parametrize("ranks", [1, *soak(2)])
def test_magnitudes_move_in_bfloat16_at_a_small_learning_rate(
    ranks: int, model: Path, data: Path, tmp_path: Path
) -> None:
    found = _run(ranks, model, data, tmp_path, num_steps=20, dtype="bfloat16", learning_rate=1e-4)
    rows, moved = (sum(one[key] for one in found) for key in ("rows", "rows_moved"))
    assert rows == 2 * (128 + 64 + 64 + 128 + 192 + 192 + 128)
    assert moved >= 0.99 * rows  # one may pass its start again on the last step

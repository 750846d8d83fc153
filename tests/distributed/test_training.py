"""Inside a run: the norm is fresh after every step and computed once a step, magnitudes move, a disk may be slow."""

import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.distributed_c10d import _set_pg_timeout

from qdora import nf4, parallel
from qdora.adapter.dora import AdaptedLinear, adapted_layers
from qdora.config import (
    ActivationCheckpointing,
    AdapterConfig,
    AdapterMethod,
    DataConfig,
    Dtype,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    RunConfig,
    TrackerConfig,
    TrackerKind,
    TrainConfig,
)
from qdora.errors import ConfigError, DataError
from qdora.parallel import arm_watchdog
from qdora.run_folder import RunFolder
from qdora.run_result import find_result, write_adapter
from qdora.sharding import gather_rows, own_rows
from qdora.training.run import train
from qdora.training.trainer import Trainer
from tests.support.marks import nightly
from tests.support.models import make_model
from tests.support.ranks import RankPool
from tests.support.runs import status_of

CPU = torch.device("cpu")
CANCELLED_TOLERANCE = 1e-4
"""Of a row of W + s B A in float32, of which all but a thousandth has cancelled."""
NORM_TOLERANCE = 1e-5
"""Relative; the norm is a sum of 128 to 192 float32 squares, against float64."""


def cancel_a_row(trainer: Trainer) -> None:
    """Makes s B A the opposite of W, but for a thousandth, in the last row of the last layer: the last rank's."""
    layer = [*adapted_layers(trainer.model).values()][-1]
    whole = [gather_rows([tensor], torch.uint8, CPU)[0].contiguous() for tensor in layer.base_tensors()[:2]]
    weight = nf4.weight_from([*whole, *layer.base_tensors()[2:]], torch.float32)[-1].clone()
    (a, first_a), (b, first_b) = (own_rows(parameter) for parameter in layer.trained_factors())
    with torch.no_grad():
        if not first_a:
            a[0] = weight / weight.norm()
        if first_b + b.shape[0] == layer.out_features:
            b[-1] = torch.tensor([-1.001 * float(weight.norm()) / layer.scaling, *[0.0] * (layer.rank - 1)])
    trainer.loaded.refresh(trainer.world.device)


def stale_by(trainer: Trainer) -> float:
    """Returns the largest relative difference of a stored gain from m / || W + s B A || in dense float64."""
    worst = 0.0
    for layer in adapted_layers(trainer.model).values():
        assert layer.magnitude is not None
        assert layer.gain is not None
        dtype = trainer.loaded.dtype
        trained = (gather_rows([parameter], dtype, CPU)[0] for parameter in layer.trained_factors())
        a, b = (matrix.double() for matrix in layer.factors(*trained, dtype))
        magnitude = gather_rows([layer.magnitude], torch.float32, CPU)[0].double()
        gain = gather_rows([layer.gain], torch.uint8, CPU)[0].contiguous().view(torch.float32).squeeze(1).double()
        whole: list[Tensor] = [
            gather_rows([tensor], torch.uint8, CPU)[0].contiguous() for tensor in layer.base_tensors()[:2]
        ]
        weight = nf4.weight_from([*whole, *layer.base_tensors()[2:]], torch.float32).double()
        dense = magnitude / (weight + layer.scaling * b @ a).norm(dim=1)
        worst = max(worst, float(((gain - dense) / dense).abs().max()))
    return worst


class Watch:
    """Looks at the trainer of a whole run before it begins, after each step, and at its end."""

    def __init__(self, cancels: bool) -> None:
        self.cancels = cancels
        self.seen: dict[str, Any] = {"norm_calls": 0, "layers": 0, "stale_by": []}
        self._norm, self._run, self._step = AdaptedLinear.project, Trainer.run, Trainer.train_step

    def project(self, layer: AdaptedLinear, a: Tensor, out: Tensor) -> None:
        """Counts the call."""
        self.seen["norm_calls"] += 1
        self._norm(layer, a, out)

    def run(self, trainer: Trainer, save: Any) -> str:
        """Counts the rows whose magnitude moves."""
        layers = adapted_layers(trainer.model)
        if self.cancels:
            cancel_a_row(trainer)
        self.seen["stale_by"].append(stale_by(trainer))  # also what a resumed run begins with
        first = {name: own_rows(layer.magnitude)[0].clone() for name, layer in layers.items()}  # type: ignore[arg-type]
        self.seen["layers"], self.seen["norm_calls"] = len(layers), 0
        status = self._run(trainer, save)
        moved = [own_rows(layer.magnitude)[0] != first[name] for name, layer in layers.items()]  # type: ignore[arg-type]
        self.seen["rows_moved"], self.seen["rows"] = int(sum(m.sum() for m in moved)), sum(m.numel() for m in moved)
        return status

    def train_step(self, trainer: Trainer, batches: Any) -> Any:
        """Compares the gains after the step."""
        result = self._step(trainer, batches)
        self.seen["stale_by"].append(stale_by(trainer))
        return result


def train_watched(
    model: Path,
    data: Path,
    output: Path,
    *,
    num_steps: int,
    learning_rate: float = 1e-3,
    dtype: Dtype = Dtype.float32,
    checkpointing: ActivationCheckpointing = ActivationCheckpointing.none,
    method: AdapterMethod = AdapterMethod.dora,
    cancels: bool = False,
) -> dict[str, Any]:
    """Trains, or goes on, on a rank of several; returns what was seen from inside."""
    config = RunConfig(
        model=ModelConfig(path=str(model), dtype=dtype),
        adapter=AdapterConfig(method=method, rank=4),
        data=DataConfig(train=str(data), packing=False, cache_dir=str(output / "cache")),
        optim=OptimConfig(learning_rate=learning_rate),
        train=TrainConfig(num_steps=num_steps, num_accumulation_steps=4, checkpoint_every=2, report=False),
        parallel=ParallelConfig(activation_checkpointing=checkpointing),
        tracker=TrackerConfig(kind=TrackerKind.none),
        output_dir=str(output / "run"),
    )
    watch = Watch(cancels)
    with (
        mock.patch.object(AdaptedLinear, "project", lambda layer, *given: watch.project(layer, *given)),
        mock.patch.object(Trainer, "run", lambda trainer, save: watch.run(trainer, save)),
        mock.patch.object(Trainer, "train_step", lambda trainer, batches: watch.train_step(trainer, batches)),
    ):
        assert train(config) == 0
    return watch.seen


def train_on_a_slow_disk(model: Path, data: Path, output: Path) -> int:
    """Trains one step on a rank of several; writing its checkpoint takes longer than a step may take."""
    step, write, timeout_s = Trainer.train_step, FileSystemWriter.write_data, 2

    def train_step(trainer: Trainer, batches: Any) -> Any:
        result = step(trainer, batches)
        arm_watchdog(replace(trainer.world, timeout_s=timeout_s))  # as the last micro-batch did, for fewer seconds
        return result

    def write_data(writer: FileSystemWriter, *arguments: Any) -> Any:
        time.sleep(timeout_s)
        return write(writer, *arguments)

    config = RunConfig(
        model=ModelConfig(path=str(model)),
        data=DataConfig(train=str(data), cache_dir=str(output / "cache")),
        train=TrainConfig(num_steps=1, report=False),
        tracker=TrackerConfig(kind=TrackerKind.none),
        output_dir=str(output / "run"),
    )
    with (
        mock.patch.object(Trainer, "train_step", train_step),
        mock.patch.object(FileSystemWriter, "write_data", write_data),
    ):
        return train(config)


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


Run = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def run(pool: RankPool, model: Path, data: Path, tmp_path: Path) -> Run:
    """Trains on so many ranks, with options of `train_watched`; the second time it goes on."""
    return lambda nproc, **options: pool.run(train_watched, model, data, tmp_path, nproc=nproc, **options)


@pytest.mark.parametrize(("ranks", "method"), [(2, "dora"), *nightly((1, "dora"), (2, "dvora"))])
def test_norm_is_fresh_after_every_step_and_after_resuming(ranks: int, method: str, run: Run) -> None:
    first, resumed = (run(ranks, num_steps=num_steps, method=AdapterMethod[method]) for num_steps in (4, 6))
    for seen in (*first, *resumed):
        assert max(seen["stale_by"]) <= NORM_TOLERANCE
    assert [len(seen["stale_by"]) for seen in (first[0], resumed[0])] == [5, 3]  # at the start, and each step


@pytest.mark.parametrize("ranks", [2, *nightly(1)])
def test_norm_of_a_row_that_cancels_is_right_before_the_next_step(ranks: int, run: Run) -> None:
    """On a rank that has the row and on one that has not; the refresh alone would leave it a tenth off."""
    for seen in run(ranks, num_steps=3, learning_rate=1e-4, cancels=True):
        assert max(seen["stale_by"]) <= CANCELLED_TOLERANCE
        assert seen["norm_calls"] == 2 * 3 * seen["layers"], "rows that cancel take a second refresh"


def test_norm_is_computed_once_a_step(run: Run) -> None:
    """With 4 micro-batches a step and every block recomputed in its backward."""
    for seen in run(2, num_steps=3, checkpointing=ActivationCheckpointing.full):
        assert seen["norm_calls"] == 3 * seen["layers"]


@pytest.mark.parametrize("ranks", [1, *nightly(2)])
def test_magnitudes_move_in_bfloat16_at_a_small_learning_rate(ranks: int, run: Run) -> None:
    seen = run(ranks, num_steps=20, dtype=Dtype.bfloat16, learning_rate=1e-4)
    rows, moved = (sum(one[key] for one in seen) for key in ("rows", "rows_moved"))
    assert rows == 2 * (128 + 64 + 64 + 128 + 192 + 192 + 128)
    assert moved >= 0.99 * rows  # one may pass its start again on the last step


def test_disk_may_be_slower_than_a_step(pool: RankPool, model: Path, data: Path, tmp_path: Path) -> None:
    """The watchdog ends a rank whose step takes too long, not one that waits for its checkpoint."""
    assert pool.run(train_on_a_slow_disk, model, data, tmp_path, nproc=2) == [0, 0]
    assert status_of(tmp_path / "run") == "finished"


def prepare_slowly(step_timeout_s: float, prepare_s: float) -> int:
    """Prepares on rank 0 for longer than a collective of a step may take; returns what this rank got."""
    world = parallel.start(ParallelConfig())
    _set_pg_timeout(timedelta(seconds=step_timeout_s), None)  # once they have met, which may take seconds

    def prepare() -> int:
        if world.is_main:
            time.sleep(prepare_s)
        return world.rank

    return parallel.main_first(world, prepare)


def test_ranks_wait_longer_for_data_than_for_a_step(pool: RankPool) -> None:
    """Rank 0 may download and tokenise for longer than parallel.timeout_s."""
    assert pool.run(prepare_slowly, 0.5, 1.5, nproc=2) == [0, 1]


def train_apart(model: Path, data: Path, folder: Path) -> str:
    """Starts a run as the only rank of a machine with its own disk; returns the mistake that ends it."""
    rank = os.environ["RANK"]
    os.environ |= {"LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0", "QDORA_SEEN_AFTER_S": "0.5"}
    (folder / rank).mkdir()
    os.chdir(folder / rank)
    config = RunConfig(
        model=ModelConfig(path=str(model)),
        data=DataConfig(train=str(data), cache_dir=str(folder / "cache")),
        train=TrainConfig(num_steps=1, report=False),
        tracker=TrackerConfig(kind=TrackerKind.none),
        output_dir="outputs/apart",
    )
    with pytest.raises(ConfigError) as mistake:
        train(config)
    return str(mistake.value)


def test_folder_of_each_machine_is_refused_before_the_first_step(
    pool: RankPool, model: Path, data: Path, tmp_path: Path
) -> None:
    for told in pool.run(train_apart, model, data, tmp_path, nproc=2):
        assert told.startswith("output_dir=outputs/apart is not the same folder on every machine")
    assert (tmp_path / "0/outputs/apart/metrics.jsonl").read_text() == ""


def train_on_own_data(model: Path, folder: Path) -> str:
    """Starts a run on a rank whose machine has a data file of its own; returns the mistake that ends it."""
    own = folder / os.environ["RANK"]
    own.mkdir()
    os.chdir(own)
    rows = ({"prompt": f"{os.environ['RANK']} + {n}", "completion": "x"} for n in range(4))
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    config = RunConfig(
        model=ModelConfig(path=str(model)),
        data=DataConfig(train="rows.jsonl", cache_dir=str(folder / "cache")),
        train=TrainConfig(num_steps=1, report=False),
        tracker=TrackerConfig(kind=TrackerKind.none),
        output_dir=str(folder / "run"),
    )
    with pytest.raises(DataError) as mistake:
        train(config)
    return str(mistake.value)


def test_other_data_on_another_machine_is_refused_on_every_rank(pool: RankPool, model: Path, tmp_path: Path) -> None:
    for told in pool.run(train_on_own_data, model, tmp_path, nproc=2):
        assert told.startswith("data.train is not the same on every machine: rank 1 has another data than rank 0")


def find_what_is_written_slowly(folders: list[Path], write_s: float, seen_after_s: float) -> str:
    """Asks for an unfinished run's adapter on a rank of several with a folder each; returns its name or the mistake."""
    os.environ["QDORA_SEEN_AFTER_S"] = str(seen_after_s)
    world = parallel.start(ParallelConfig())

    def write(*given: Any) -> None:
        time.sleep(write_s)
        write_adapter(*given)

    with mock.patch("qdora.run_result.write_adapter", write):
        try:
            result = find_result(RunFolder(folders[world.rank]), world)
        except ConfigError as mistake:
            return str(mistake)
    assert result.adapter is not None
    return result.adapter.name


def test_ranks_wait_for_a_checkpoints_adapter_as_long_as_it_is_written(
    pool: RankPool, run: Run, tmp_path: Path
) -> None:
    """However short the wait for another machine's file is, which ends where the folders are not the same one."""
    run(2, num_steps=2)
    mine = tmp_path / "run"
    (mine / "adapter").rename(mine / "gone")
    other = shutil.copytree(mine, tmp_path / "other")
    told = pool.run(find_what_is_written_slowly, [mine, mine], 1.0, 0.1, nproc=2)
    assert told == ["step-00000002", "step-00000002"]
    for said in pool.run(find_what_is_written_slowly, [mine, other], 0.0, 0.1, nproc=2):
        assert said == (
            f"run={other} is not the same folder on every machine, and each rank reads there the adapter that rank 0 "
            "has written of its checkpoint: put it on a file system that they share"
        )

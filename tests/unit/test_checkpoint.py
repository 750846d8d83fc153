"""Which checkpoints stay, what the newest is, when one is tried again, and that training waits for the copy alone."""

import time
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemWriter

from qdora import parallel
from qdora.adapter.peft_format import WEIGHTS
from qdora.checkpoint import Checkpoints, load
from qdora.checkpoint_folder import Manifest, complete, damage, read_manifest
from qdora.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from qdora.config.values import config_values
from qdora.errors import ConfigError
from qdora.run_folder import RunFolder
from qdora.training.resume import keep_rows_per_step
from tests.support.faults import record_files


def manifest(step: int, eval_loss: float | None = None) -> Manifest:
    """Returns that of a run on one rank, with one row a step."""
    return Manifest(
        step=step,
        num_tokens=0,
        eval_loss=eval_loss,
        loader={},
        guard={},
        rows_per_step=1,
        world_size=1,
        run_id="run",
        tracker_id=None,
        config={},
        versions={},
        data_fingerprint="data",
        model_fingerprint="model",
    )


def steps(folder: Path) -> list[int]:
    return [read_manifest(path).step for path in complete(folder)]


@pytest.mark.parametrize(
    ("losses", "keep", "expected"),
    [
        ([3.0, 1.0, 2.0, 4.0, 5.0], 2, [2, 4, 5]),
        ([3.0, None, None, 2.0, None], 2, [4, 5]),
        ([1.0, None, None, 2.0, None], 3, [1, 3, 4, 5]),
        ([None] * 5, 2, [4, 5]),
    ],
    ids=["best stays", "best is new", "three", "no eval"],
)
def test_newest_and_the_best_stay(tmp_path: Path, losses: list[float | None], keep: int, expected: list[int]) -> None:
    checkpoints = Checkpoints(tmp_path, parallel.start_alone("test"), keep)
    for step, loss in enumerate(losses, 1):
        checkpoints.save_async({"a": torch.full((3,), float(step))}, manifest(step, loss))
        checkpoints.wait()
    assert steps(tmp_path) == expected
    assert (tmp_path / "latest").read_text() == "step-00000005\n"


def test_leftovers_and_a_damaged_old_one_do_not_stop_the_next(tmp_path: Path) -> None:
    """Half a `latest` of a killed run, half a checkpoint, and an old one without a manifest that can be read."""
    (tmp_path / "latest.partial").touch()
    (tmp_path / "step-00000009.partial").mkdir()
    checkpoints = Checkpoints(tmp_path, parallel.start_alone("test"), keep=2)
    for step in range(1, 5):
        checkpoints.save_async({"a": torch.zeros(3)}, manifest(step))
        checkpoints.wait()
        assert checkpoints.failure is None
        if step == 1:
            (tmp_path / "step-00000001" / "manifest.json").write_text("{")
    assert [path.name for path in complete(tmp_path)] == ["step-00000003", "step-00000004"]
    assert not list(tmp_path.glob("step*.partial"))


def test_manifest_that_was_changed_or_lists_less_is_damage(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, parallel.start_alone("test"), keep=2)
    checkpoints.save_async({"a": torch.zeros(3)}, manifest(7))
    checkpoints.wait()
    (path,) = complete(tmp_path)
    file = path / "manifest.json"
    text = file.read_text()
    file.write_text(text.replace('"step": 7', '"step": 8'))
    assert damage(path) == "manifest.json is not what was written"
    file.write_text(text)
    assert damage(path) is None
    (path / "__1_0.distcp").touch()
    assert damage(path) == "__1_0.distcp does not belong there"
    (path / "__1_0.distcp").unlink()
    (path / "__0_0.distcp").unlink()
    assert damage(path) == "__0_0.distcp is missing"


def test_what_changes_while_it_is_written_is_not_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training waits for the copy alone: here the disk takes until training has gone on."""
    gone_on, write = Event(), FileSystemWriter.write_data

    def write_later(self: FileSystemWriter, *arguments: Any) -> Any:
        assert gone_on.wait(60), "training waits for the disk"
        return write(self, *arguments)

    monkeypatch.setattr(FileSystemWriter, "write_data", write_later)
    world = parallel.start_alone("test")
    checkpoints = Checkpoints(tmp_path, world, keep=2)
    tensor = torch.zeros(2**20)
    checkpoints.save_async({"a": tensor}, manifest(1))
    assert checkpoints.under_way
    assert not checkpoints.written
    assert not complete(tmp_path)
    tensor.fill_(7)
    gone_on.set()
    while not checkpoints.written:
        time.sleep(0.001)
    checkpoints.wait()
    (path,) = complete(tmp_path)
    assert damage(path) is None
    read = {"a": torch.ones(2**20)}
    load(path, read, read_manifest(path), world)
    assert not read["a"].any()


def test_rows_of_a_step_that_another_number_of_ranks_cannot_share_are_refused() -> None:
    """12 rows a step, 3 at a time: 1, 2 and 4 ranks make them by accumulating; 3 and 8 ranks cannot."""
    model, data = ModelConfig(path="model"), DataConfig(train="data.jsonl")
    config = RunConfig(model=model, data=data, train=TrainConfig(micro_batch_size=3, num_accumulation_steps=4))
    kept = replace(manifest(1), rows_per_step=12, config=config_values(config))
    for num_ranks, steps in ((1, 4), (2, 2), (4, 1)):
        assert keep_rows_per_step(config, num_ranks, kept).train.num_accumulation_steps == steps
    for num_ranks, rows in ((3, 36), (8, 96)):
        words = rf"the run has 12 rows a step, but .*=3 x .*=4 on {num_ranks} ranks are {rows}: .* so that they are 12"
        with pytest.raises(ConfigError, match=words):
            keep_rows_per_step(config, num_ranks, kept)
    allowed = replace(config, allow_changes=True)
    assert keep_rows_per_step(allowed, 8, kept) == allowed


def test_checkpoint_that_fails_is_tried_again_after_1_2_4_steps(tmp_path: Path) -> None:
    """As long as a file is where its folder should be; after a success the next failure begins with 1 again."""
    folder = tmp_path / "checkpoints"
    checkpoints = Checkpoints(folder, parallel.start_alone("test"), keep=2)

    def retried_after(step: int) -> int | None:
        checkpoints.save_async({"a": torch.zeros(3)}, manifest(step))
        checkpoints.wait()
        return None if checkpoints.retry_at is None else checkpoints.retry_at - step

    folder.touch()
    assert [retried_after(step) for step in (5, 6, 8)] == [1, 2, 4]
    folder.unlink()
    assert retried_after(12) is None
    assert steps(folder) == [12]
    folder.rename(tmp_path / "elsewhere")
    folder.touch()
    assert retried_after(20) == 1


def test_run_is_finished_where_its_result_is_whole(tmp_path: Path) -> None:
    """A loss of power may leave an adapter without content under its name: that run is to be finished again."""
    run = RunFolder(tmp_path)
    run.write_summary({"status": "finished"})
    assert not run.is_finished()
    run.adapter.mkdir()
    (run.adapter / WEIGHTS).touch()
    assert not run.is_finished()
    (run.adapter / WEIGHTS).write_bytes(b"weights")
    assert run.is_finished()
    run.write_summary({"status": "preempted"})
    assert not run.is_finished()


def test_checkpoint_is_on_the_disk_before_it_gets_its_name(tmp_path: Path) -> None:
    """Each file, and the names in its folder; the folder's own name follows, then `latest`, which is last."""
    checkpoints = Checkpoints(tmp_path, parallel.start_alone("test"), keep=2)
    with record_files() as events:
        checkpoints.save_async({"a": torch.zeros(3)}, manifest(7))
        checkpoints.wait()
    (path,) = complete(tmp_path)
    named = events.index(("name", path.name))
    before = {what for kind, what in events[:named] if kind == "fsync"}
    assert {file.name for file in path.iterdir()} | {"step-00000007.partial"} <= before
    assert events.index(("name", "manifest.json")) > events.index(("fsync", "manifest.json.partial"))
    rest = events[named + 1 :]
    assert [one for one in rest if one[1] != path.name] == [
        ("fsync", tmp_path.name),
        ("fsync", "latest.partial"),
        ("name", "latest"),
        ("fsync", "latest"),
        ("fsync", tmp_path.name),
    ]

"""Which checkpoints stay, what the newest is, and that training waits for the copy alone."""

import time
from pathlib import Path

import pytest
import torch

from qdora import parallel
from qdora.checkpoint import Checkpoints, Manifest, complete, damage, load, read_manifest


def manifest(step: int, eval_loss: float | None = None) -> Manifest:
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


@pytest.mark.alone
def test_what_changes_while_it_is_written_is_not_in_it(tmp_path: Path) -> None:
    """128 MiB: training waits for the copy, and the disk takes longer."""
    world = parallel.start_alone("test")
    checkpoints = Checkpoints(tmp_path, world, keep=2)
    tensor = torch.zeros(2**25)
    started = time.perf_counter()
    checkpoints.save_async({"a": tensor}, manifest(1))
    assert checkpoints.under_way
    assert not checkpoints.written
    assert not complete(tmp_path)
    tensor.fill_(7)
    waited = checkpoints.stall_s
    while not checkpoints.written:
        time.sleep(0.001)
    in_all = time.perf_counter() - started
    checkpoints.wait()
    (path,) = complete(tmp_path)
    assert damage(path) is None
    assert waited < 0.5 * in_all
    read = {"a": torch.ones(2**25)}
    load(path, read, read_manifest(path), world)
    assert not read["a"].any()

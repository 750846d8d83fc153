"""What a sweep refuses, how its runs are called, and what it makes of their records."""

import json
import os
import re
import threading
from pathlib import Path
from typing import Any

import pytest

from qdora.commands import compose, run
from qdora.commands.members import _own_gpus, member_name
from qdora.commands.sweep import _folder, _parsed, sweep
from qdora.commands.sweep_results import RECORDS, Member, conclude
from qdora.errors import ConfigError


@pytest.mark.parametrize(
    ("swept", "name"),
    [
        ({"optim.learning_rate": "0.0001", "adapter.rank": "8"}, "learning_rate-0.0001+rank-8"),
        ({"+experiment": "smollm2_identity"}, "experiment-smollm2_identity"),
        ({"model": "qwen3_0_6b"}, "model-qwen3_0_6b"),
        ({}, "0"),
    ],
)
def test_run_is_called_after_what_it_does_not_share(swept: dict[str, str], name: str) -> None:
    assert member_name(swept) == name


def test_names_of_different_runs_are_different() -> None:
    swept: list[dict[str, str]] = [
        {"model.path": "a/b"},
        {"model.path": "a-b"},
        {"model.path": "a b"},
        {"data.path": "a/b"},
        {"adapter.target_modules": "[q_proj,v_proj]"},
        {"adapter.target_modules": "[q_proj]"},
        {"a.x": "1", "b.x": "2"},
        {"b.x": "1", "a.x": "2"},
        *({"model.path": "long" * 100 + end} for end in "ab"),
    ]
    names = {member_name(options) for options in swept}
    assert len(names) == len(swept)
    for name in names:
        assert len(name) < 200
        values = compose("train", [f"output_dir=outputs/{name}"])  # to be written without quotes
        assert values is not None
        assert values.output_dir == f"outputs/{name}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["merge", "-m", "run=a,b"], "-m is a sweep of training runs: qdora train -m ..., there is none of merge"),
        (["train", "-m", "output_dir=a,b"], "output_dir=a,b: give one folder, in which each run of the sweep gets"),
        (["train", "-m", "adapter.rnak=1,2"], "there is no option adapter.rnak, did you mean 'adapter.rank'?"),
        (["train", "-m", "hydra/launcher=slurmy"], "hydra/launcher=slurmy: no such choice: joblib and submitit want"),
        (["train", "-m", "seed=1,2", "--fast"], "Options are written name=value"),
    ],
)
def test_mistake_is_one_line_and_status_2(
    arguments: list[str], message: str, capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(arguments) == 2
    told = capfd.readouterr().err.splitlines()
    assert len(told) == 1
    assert message in told[0]


def test_sweep_under_torchrun_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ConfigError, match=r"call launch/train\.sh -m \.\.\. without torchrun"):
        sweep(["seed=1,2"])


def test_folder_of_a_run_is_not_made_a_sweep(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").touch()
    with pytest.raises(ConfigError, match="is the folder of a run: give another"):
        sweep([f"output_dir={tmp_path}", "seed=1,2"])


def test_folder_of_a_sweep_without_output_dir_is_that_of_its_options() -> None:
    """Whatever their order and Hydra's own options; other values get another one."""
    options = ["seed=1,2", "adapter.rank=4"]
    folder = _folder(_parsed(options))
    assert re.fullmatch(r"outputs/sweep-\w+", str(folder))
    for same in (options[::-1], [*options, "hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]):
        assert _folder(_parsed(same)) == folder
    for other in (["seed=1,3", "adapter.rank=4"], ["seed=1,2"], ["seed=1,2", "adapter.rank=8"]):
        assert _folder(_parsed(other)) != folder


def test_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be made"):
        sweep([f"output_dir={tmp_path}/file/sweep", "seed=1,2"])


def test_runs_beside_each_other_have_gpus_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3,5,7,8")
    monkeypatch.setenv("NPROC", "2")
    had: list[str] = []

    def third() -> None:
        with _own_gpus(tmp_path) as gpus:
            had.append(gpus["CUDA_VISIBLE_DEVICES"])

    waiting = threading.Thread(target=third)
    with _own_gpus(tmp_path) as first:
        with _own_gpus(tmp_path) as second:
            assert [gpus["CUDA_VISIBLE_DEVICES"] for gpus in (first, second)] == ["2,3", "5,7"]
            waiting.start()
            waiting.join(0.5)
            assert not had
        waiting.join(10)
        assert had == ["5,7"]


@pytest.mark.parametrize(("gpus", "ranks"), [("0,1,2,3", None), ("0,1", "2"), ("", "1"), ("0,1", "0")])
def test_run_that_shares_with_no_other_has_all_gpus(
    gpus: str, ranks: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", gpus)
    if ranks is not None:
        monkeypatch.setenv("NPROC", ranks)
    with _own_gpus(tmp_path) as chosen:
        assert chosen == {}


def record(folder: Path, number: int, seed: str, losses: list[float] | None = None, **values: Any) -> Path:
    """The record of a run, and its summary where it has losses: the first and the last on held-out data."""
    run_folder = folder / f"seed-{seed}"
    (folder / RECORDS).mkdir(exist_ok=True)
    file = folder / RECORDS / f"seed-{seed}.json"
    Member(number=number, overrides={"seed": seed}, folder=str(run_folder), **values).write(file)
    if losses:
        run_folder.mkdir()
        summary = {
            "steps": 8,
            "eval_losses": {"0": losses[0], "8": losses[1]},
            "last_loss": 0.5,
            "tokens_per_second": 2.0,
        }
        (run_folder / "summary.json").write_text(json.dumps(summary))
        (run_folder / "metrics.jsonl").write_text('{"step": 1, "loss": 3.0}\n{"step": 8, "loss": 0.5}\n')
    return file


def test_best_is_the_finished_run_of_the_lowest_held_out_loss(tmp_path: Path, capsys: Any) -> None:
    record(tmp_path, 1, "10", [4.0, 1.5], status="finished", exit_status=0, seconds=61.4)
    record(tmp_path, 0, "9", [4.0, 2.5], status="finished", exit_status=0)
    record(tmp_path, 2, "11", [4.0, 0.5], status="preempted", exit_status=75)
    assert conclude(tmp_path, ["a=1"], 0) == 75
    values = json.loads((tmp_path / "sweep.json").read_text())
    assert values["options"] == ["a=1"]
    assert values["best"] == str(tmp_path / "seed-10")
    assert [one["overrides"]["seed"] for one in values["members"]] == ["9", "10", "11"]
    assert [one["eval_loss"] for one in values["members"]] == [2.5, 1.5, 0.5]
    told = capsys.readouterr().out
    assert "61 s" in told
    assert "1.5000" in told
    assert (tmp_path / "sweep.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("ends", "status"),
    [
        ([("finished", 0), ("finished", 0)], 0),
        ([("finished", 0), ("not started", None)], 75),
        ([("preempted", 75), ("failed", 2), ("failed", 137)], 2),
        ([("finished", 0), ("lost", None)], 1),
    ],
)
def test_status_of_a_sweep(ends: list[tuple[str, int | None]], status: int, tmp_path: Path) -> None:
    for number, (end, exit_status) in enumerate(ends):
        record(tmp_path, number, str(number), status=end, exit_status=exit_status)
    assert conclude(tmp_path, [], 0) == status


def test_records_of_an_earlier_sweep_do_not_count(tmp_path: Path) -> None:
    old = record(tmp_path, 0, "1", status="failed", exit_status=1)
    os.utime(old, (1000, 1000))
    record(tmp_path, 0, "2", status="finished", exit_status=0)
    assert conclude(tmp_path, [], 2000) == 0
    assert [one["overrides"] for one in json.loads((tmp_path / "sweep.json").read_text())["members"]] == [{"seed": "2"}]

"""What a user is told of a run that goes on under other options, and what an interrupted run can be used for."""

import shutil
from pathlib import Path

import pytest
import yaml

from qdora.commands import compose, typed
from qdora.commands import run as command
from qdora.config import RunConfig
from qdora.errors import CheckpointError
from qdora.training.run import train
from tests.support.runs import metrics_of, summary_of, wandb_records

Told = pytest.CaptureFixture[str]


def trained(capsys: Told, *arguments: str) -> str:
    """Trains in this process, which has to end well; returns what was said."""
    capsys.readouterr()
    assert command(["train", *arguments]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def steps_and_options(changes: list[dict[str, object]]) -> list[tuple[object, ...]]:
    return [(change["from_step"], change["option"], change["before"], change["now"]) for change in changes]


def test_changes_are_told_and_recorded_with_the_step_from_which_they_hold(
    options: list[str], tmp_path: Path, capsys: Told
) -> None:
    """Over several resumes, with a value that comes back; by the config, the metrics, the summary, and W&B."""
    run = tmp_path / "run"
    common = [*options, "optim.warmup_ratio=0", f"output_dir={run}"]
    first = [*common, "train.num_steps=2"]
    assert "changed" not in trained(capsys, *first)
    second = [*common, "train.num_steps=4", "optim.learning_rate=1e-3", "optim.schedule=linear"]
    told = trained(capsys, *second)
    words = "optim.learning_rate 0.01 -> 0.001, optim.schedule cosine -> linear, train.num_steps 2 -> 4"
    assert f"changed from step 3: {words}\n" in told
    assert told.index("changed from") < told.index("ranks: 1 on"), "told after the model was loaded"
    third = [*common, "train.num_steps=6", "tracker=wandb", "tracker.mode=offline"]
    told = trained(capsys, *third)
    assert "optim.learning_rate 0.001 -> 0.01, optim.schedule linear -> cosine, train.num_steps 4 -> 6" in told
    expected = [
        (3, "optim.learning_rate", 0.01, 0.001),
        (3, "optim.schedule", "cosine", "linear"),
        (3, "train.num_steps", 2, 4),
        (5, "optim.learning_rate", 0.001, 0.01),
        (5, "optim.schedule", "linear", "cosine"),
        (5, "train.num_steps", 4, 6),
        (5, "tracker.kind", "none", "wandb"),
        (5, "tracker.mode", "auto", "offline"),
    ]
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert steps_and_options(config["changes"]) == expected
    assert config["optim"]["learning_rate"] == 0.01
    assert steps_and_options(summary_of(run)["changes"]) == expected
    changed = {record["step"]: record["changed"] for record in metrics_of(run) if "changed" in record}
    assert {step: steps_and_options(changes) for step, changes in changed.items()} == {3: expected[:3], 5: expected[3:]}
    (started,) = wandb_records(run, "run")
    assert started["config"]["update"]["changes"] == config["changes"]
    assert not [record for record in wandb_records(run, "history") if "changed" in str(record)]

    capsys.readouterr()
    assert command(["train", *third]) == 0
    assert "is finished already" in capsys.readouterr().out
    assert command(["train", *second]) == 0
    assert "not trained with what is given now (optim.learning_rate 0.01 -> 0.001" in capsys.readouterr().out

    back = trained(capsys, *first, f"resume={run}/checkpoints/step-00000004", "train.num_steps=5")
    assert "changed from step 5: optim.learning_rate 0.001 -> 0.01" in back
    assert steps_and_options(summary_of(run)["changes"])[:3] == expected[:3]
    assert {change[0] for change in steps_and_options(summary_of(run)["changes"])[3:]} == {5}


def test_each_way_out_of_a_refusal_goes_on(options: list[str], tmp_path: Path, capsys: Told) -> None:
    run = tmp_path / "run"
    trained(capsys, *options, "train.num_steps=2", f"output_dir={run}")
    more = [*options, "train.num_steps=3", f"output_dir={run}"]
    other = [*more, "adapter.rank=8", "seed=1"]
    assert command(["train", *other]) == 2
    told = capsys.readouterr().err
    assert "it has adapter.rank=4 (now 8), seed=0 (now 1). adapter.rank=4 seed=0 goes on with it; output_dir=" in told
    assert "going on from step 2 of 3" in trained(capsys, *other, "adapter.rank=4", "seed=0")
    assert "step 1/3" in trained(capsys, *other, f"output_dir={tmp_path}/another")
    assert command(["train", *more, "train.num_steps=4", "seed=1"]) == 2
    assert "; allow_changes=true goes on all the same" in capsys.readouterr().err
    told = trained(capsys, *more, "train.num_steps=4", "seed=1", "allow_changes=true")
    assert "changed from step 4: train.num_steps 3 -> 4, seed 0 -> 1" in told


def test_other_data_is_refused_before_the_model_is_loaded(
    options: list[str], data: Path, tmp_path: Path, capsys: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And under `allow_changes=true` told."""
    run, changed = tmp_path / "run", tmp_path / "data.jsonl"
    shutil.copy(data, changed)
    given = [*options, f"data.train={changed}", f"output_dir={run}"]
    trained(capsys, *given, "train.num_steps=2")
    changed.write_text("".join(data.read_text().splitlines(keepends=True)[1:]))
    values = compose("train", [*given, "train.num_steps=3"])
    assert values is not None
    with monkeypatch.context() as patch:
        patch.setattr("qdora.training.run.load_model", None)
        back = rf"what data\.train={changed} held before, put back there, goes on with it"
        with pytest.raises(CheckpointError, match=back):
            train(typed(values, RunConfig))
    told = trained(capsys, *given, "train.num_steps=3", "allow_changes=true")
    assert "changed from step 3: fingerprint of the data " in told

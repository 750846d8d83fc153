"""What a user is told of a run that goes on under other options, and what an interrupted run can be used for."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from qdora.checkpoint_folder import MANIFEST
from qdora.commands import compose, typed
from qdora.commands import run as command
from qdora.config import RunConfig
from qdora.errors import CheckpointError
from qdora.run_folder import RunFolder
from qdora.training.run import train
from tests.support.marks import nightly
from tests.support.processes import end, qdora, start, wait_for_steps
from tests.support.runs import copy_without_result, long_run, metrics_of, summary_of, wandb_records

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


def test_run_goes_on_where_what_it_began_with_was_moved(
    options: list[str], tiny: Path, data: Path, tmp_path: Path, capsys: Told
) -> None:
    """Model and data under new names, without held-out data, and without its first adapter: the same in each number."""
    first, run, twin = (tmp_path / name for name in ("first", "run", "twin"))
    layers = "adapter.target_modules=[q_proj,v_proj]"
    trained(capsys, *options, layers, "train.num_steps=1", f"output_dir={first}")
    shutil.copytree(tiny, tmp_path / "model")
    for name in ("train.jsonl", "eval.jsonl"):
        shutil.copy(data, tmp_path / name)
    own = [f"{name}={tmp_path}/{file}" for name, file in (("data.train", "train.jsonl"), ("data.eval", "eval.jsonl"))]
    given = [*options, f"model.path={tmp_path}/model", *own, f"adapter.path={first}/adapter"]
    given += ["optim.schedule=constant", "optim.warmup_ratio=0"]  # which know nothing of the last step
    trained(capsys, *given, "train.num_steps=4", f"output_dir={twin}")
    trained(capsys, *given, "train.num_steps=2", f"output_dir={run}")
    for name in ("first", "model", "train.jsonl", "eval.jsonl"):
        (tmp_path / name).rename(tmp_path / f"moved-{name}")
    assert command(["train", *given, "train.num_steps=4", f"output_dir={run}"]) == 2
    assert "moved or renamed, model.path=NEW goes on with the run" in capsys.readouterr().err
    moved = [f"model.path={tmp_path}/moved-model", f"data.train={tmp_path}/moved-train.jsonl", "data.eval=null"]
    told = trained(capsys, *given, *moved, "train.num_steps=4", f"output_dir={run}")
    assert f"adapter.path={first}/adapter, with which the run began, is not there: the tokenizer of the base" in told
    assert "going on from step 2 of 4" in told
    one, two = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (run, twin))
    assert one.keys() == two.keys()
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())
    assert yaml.safe_load((run / "config.yaml").read_text())["adapter"]["path"] == f"{first}/adapter"


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


@pytest.fixture(scope="module")
def interrupted(uninterrupted: dict[int, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of 30 steps as it was after 25: no result, and nothing of what came later."""
    folder = copy_without_result(uninterrupted[1], tmp_path_factory.mktemp("interrupted") / "run")
    shutil.rmtree(folder / "checkpoints" / "step-00000030")
    (folder / "summary.json").unlink()
    return folder


def test_adapter_of_a_checkpoint_is_what_the_run_would_have_left(
    uninterrupted: dict[int, Path], tmp_path: Path, capsys: Told
) -> None:
    """Bit for bit; written once, and anew where the step was made again."""
    run = copy_without_result(uninterrupted[1], tmp_path / "run")
    (run / "summary.json").unlink()
    ask = ["generate", f"run={run}", "prompt=3+3=", "max_new_tokens=2"]
    assert command(ask) == 0
    told = capsys.readouterr()
    assert "is not finished: its newest checkpoint is taken, step 30 of 30" in told.err
    written = run / "adapters" / "step-00000030"
    one, two = (load_file(folder / "adapter_model.safetensors") for folder in (uninterrupted[1] / "adapter", written))
    assert one.keys() == two.keys()
    assert all(torch.equal(tensor, two[name]) and tensor.dtype == two[name].dtype for name, tensor in one.items())
    before = written.stat().st_ino
    assert command(ask) == 0
    assert written.stat().st_ino == before
    answer = capsys.readouterr().out
    assert command(["generate", f"run={uninterrupted[1]}", *ask[2:]]) == 0
    assert capsys.readouterr().out == answer == told.out
    note = json.loads((written / "trained_over.json").read_text())
    (written / "trained_over.json").write_text(json.dumps(note | {"checkpoint": "another"}))
    assert command(ask) == 0
    assert written.stat().st_ino != before
    assert [path.name for path in written.parent.iterdir()] == ["step-00000030"]


def test_adapters_of_checkpoints_that_are_gone_are_removed(
    uninterrupted: dict[int, Path], tmp_path: Path, capsys: Told
) -> None:
    """When another one is written; those whose checkpoint is there stay."""
    run = copy_without_result(uninterrupted[1], tmp_path / "run")
    (run / "summary.json").unlink()
    newest, before = (run / "checkpoints" / f"step-000000{step}" for step in (30, 25))

    def asked() -> list[str]:
        assert command(["generate", f"run={run}", "prompt=3+3=", "max_new_tokens=2"]) == 0, capsys.readouterr().err
        return sorted(path.name for path in (run / "adapters").iterdir())

    aside = newest.rename(run / "aside")
    assert asked() == [before.name]
    aside.rename(newest)
    assert asked() == [before.name, newest.name]
    shutil.rmtree(before)
    shutil.rmtree(run / "adapters" / newest.name)
    assert asked() == [newest.name]


def test_interrupted_run_is_evaluated_merged_and_talked_to(
    interrupted: Path, data: Path, tmp_path: Path, capsys: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    note = f"run={interrupted} is not finished: its newest checkpoint is taken, step 25 of 30"
    scores = tmp_path / "scores"
    assert command(["evaluate", f"run={interrupted}", f"data.eval={data}", f"output_dir={scores}"]) == 0
    assert note in capsys.readouterr().out
    assert json.loads((scores / "results.json").read_text())["adapter"].endswith("/adapters/step-00000025")
    assert command(["merge", f"run={interrupted}", f"output={tmp_path}/merged"]) == 0
    assert note in capsys.readouterr().out
    card = (tmp_path / "merged" / "README.md").read_text()
    assert "| Status | not finished: the checkpoint of step 25 |" in card
    assert "| Learning rate | 0.01, cosine |" in card
    monkeypatch.setattr("sys.stdin", (tmp_path / "questions").open("w+"))
    (tmp_path / "questions").write_text("3+3=\n")
    assert command(["chat", f"run={interrupted}", "max_new_tokens=2"]) == 0
    assert note in capsys.readouterr().err


def test_report_of_an_interrupted_run_has_answers_of_its_newest_checkpoint(
    interrupted: Path, data: Path, tmp_path: Path, capsys: Told
) -> None:
    run = Path(shutil.copytree(interrupted, tmp_path / "run"))
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["data"]["eval"] = str(data)
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    assert command(["report", f"run={run}", "num_answers=2"]) == 0
    assert f"run={run} is not finished: its newest checkpoint is taken, step 25 of 30" in capsys.readouterr().out
    answers = json.loads((run / "answers.json").read_text())["answers"]
    assert [answer["prompt"] for answer in answers] == ["0+0=", "1+1="]
    assert all(answer["before"] != answer["after"] for answer in answers)
    assert "After: by the checkpoint of step 25." in (run / "report.html").read_text()


def test_damaged_checkpoint_is_passed_over_and_keeps_its_name(
    uninterrupted: dict[int, Path], tmp_path: Path, capsys: Told
) -> None:
    """What is renamed, the run itself renames when it goes on."""
    run = copy_without_result(uninterrupted[1], tmp_path / "run")
    (run / "checkpoints" / "step-00000030" / MANIFEST).write_text("{")
    ask = ["generate", f"run={run}", "prompt=3+3=", "max_new_tokens=2"]
    assert command(ask) == 0
    told = capsys.readouterr().err
    assert "checkpoint is taken, step 25 of 30; step-00000030 is damaged (manifest.json cannot be read" in told
    assert (run / "checkpoints" / "step-00000030").exists()
    (run / "checkpoints" / "step-00000025" / MANIFEST).write_text("{")
    assert command(ask) == 2
    assert "is not finished, all of whose checkpoints are damaged: manifest.json cannot" in capsys.readouterr().err
    shutil.rmtree(run / "checkpoints")
    assert command(ask) == 2
    assert "is not finished, and has no checkpoint yet. Wait for its end" in capsys.readouterr().err


def test_run_that_goes_on_after_its_end_is_asked_at_its_newest_step(
    options: list[str], tmp_path: Path, capsys: Told
) -> None:
    """Not by the adapter of its first end, which is another one than the card would say."""
    run = tmp_path / "run"
    given = [*options, "train.checkpoint_every=2", f"output_dir={run}"]
    trained(capsys, *given, "train.num_steps=2")
    process = start([*given, "train.num_steps=100", "optim.learning_rate=1e-3"], 1)
    wait_for_steps(run, 5, process)
    ask = ["generate", f"run={run}", "prompt=3+3=", "max_new_tokens=2"]
    assert command(ask) == 0, capsys.readouterr().err
    assert f"run={run} is not finished: its newest checkpoint is taken, step " in capsys.readouterr().err
    end(process)
    assert command(["merge", f"run={run}", f"output={tmp_path}/merged", "verify=false"]) == 0
    card = (tmp_path / "merged" / "README.md").read_text()
    assert "| Learning rate | 0.01 up to step 2, 0.001 from step 3, cosine |" in card
    assert "| Changed on resuming | from step 3: optim.learning_rate 0.01 -> 0.001, train.num_steps 2 -> 100 |" in card


def test_change_that_no_checkpoint_has_yet_is_not_claimed_of_the_checkpoint(
    interrupted: Path, tiny: Path, data: Path, tmp_path: Path, capsys: Told
) -> None:
    """The run was started again with another rate and killed before it saved."""
    run = tmp_path / "run"
    shutil.copytree(interrupted, run)
    folder = RunFolder(run)
    values = compose("train", [*long_run(tiny, data), "optim.learning_rate=1e-4", f"output_dir={run}"])
    assert values is not None
    folder.start(typed(values, RunConfig), 25)
    folder.release()
    assert command(["merge", f"run={run}", f"output={tmp_path}/merged", "verify=false"]) == 0
    assert "| Learning rate | 0.01, cosine |" in (tmp_path / "merged" / "README.md").read_text()


@pytest.mark.parametrize("nproc", [2, *nightly(1)])
def test_interrupted_full_fine_tuning_is_evaluated_at_its_checkpoint(
    options: list[str], data: Path, tmp_path: Path, nproc: int
) -> None:
    """As the exported model is, in float32; ranks that share a copy take their rows of it."""
    run = tmp_path / "run"
    full = ["adapter=none", "quant=none", "optim.learning_rate=1e-3", "train.num_steps=3", "model.dtype=float32"]
    assert qdora("train", *options, *full, f"output_dir={run}").returncode == 0

    def evaluated(output: str) -> dict[str, object]:
        asked = ["evaluate", f"run={run}", f"data.eval={data}", "sharded=true", f"output_dir={tmp_path / output}"]
        done = qdora(*asked, nproc=nproc)
        assert done.returncode == 0, done.stderr
        assert ("its newest checkpoint is taken, step 3 of 3" in done.stdout) == (output == "checkpoint")
        assert done.stdout.count("newest checkpoint") <= 1
        results: dict[str, object] = json.loads((tmp_path / output / "results.json").read_text())
        return results

    at_end = evaluated("end")
    (run / "model").rename(run / "gone")
    at_checkpoint = evaluated("checkpoint")
    assert at_checkpoint["loss"] == at_end["loss"]
    assert at_checkpoint["identity"] != at_end["identity"]
    done = qdora("merge", f"run={run}", f"output={tmp_path}/merged")
    assert done.returncode == 2
    assert "trains every weight and is not finished" in done.stderr

"""A study on a tiny model from its options to its tables, stopped and gone on with."""

import csv
import gzip
import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from qdora.commands.members import _is_done
from qdora.config import OnExceed
from qdora.errors import ConfigError
from qdora.run_folder import RunFolder
from qdora.run_inputs import replaced
from tests.support.models import make_model
from tests.support.processes import interrupt_when, qdora
from tests.support.runs import metrics_of, summary_of

METHODS = ("qlora", "qdora")
NAMES = [f"{method}-rank-2-rate-0.01-seed-{seed}" for method in METHODS for seed in (0, 1)]


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two methods and a choice of two learning rates for one of them, two seeds."""
    folder = tmp_path_factory.mktemp("study")
    rows = [
        {"prompt": f"{n} is ", "completion": ["even", "odd"][n % 2], "choices": ["even", "odd"], "answer": n % 2}
        for n in range(60)
    ]
    (folder / "test").mkdir()
    for name, some in (("train", rows[:40]), ("tune", rows[40:48]), ("test/parity", rows[48:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    model = make_model(folder / "model", "llama", num_hidden_layers=1)
    return [
        "study",
        "+study=methods",
        *(f"~methods.{name}" for name in ("full", "full_nf4", "lora", "dora")),
        "methods.qlora.learning_rates=[1e-2]",
        "methods.qdora.learning_rates=[1e-6,1e-2]",
        f"model.path={model}",
        f"data.train={folder / 'train.jsonl'}",
        f"data.eval={folder / 'tune.jsonl'}",
        "tasks=[parity]",
        f"tasks_path={folder / 'test'}",
        "ranks=[2]",
        "seeds=[0,1]",
        "train.num_steps=3",
        "tracker=none",
        "train.report=false",
        "parallel=none",
    ]


@pytest.fixture(scope="module")
def finished(options: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the study, stopped after its first run and gone on with by two processes."""
    folder = tmp_path_factory.mktemp("results") / "study"
    is_time, command = lambda: any(folder.glob("*/summary.json")), [*options, f"output_dir={folder}"]
    assert interrupt_when(is_time, command, signal.SIGTERM) == 75
    assert not (folder / "study.json").exists()
    two = "launcher=['hydra/launcher=joblib','hydra.launcher.n_jobs=2']"
    done = qdora(*options, two, f"output_dir={folder}", timeout_s=400)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "is finished already" in done.stdout
    return folder


def read(folder: Path) -> dict[str, Any]:
    """study.json."""
    values: dict[str, Any] = json.loads((folder / "study.json").read_text())
    return values


def test_each_method_is_compared_at_its_own_best_rate(finished: Path) -> None:
    values = read(finished)
    assert [(arm["method"], arm["rank"], arm["learning_rate"]) for arm in values["arms"]] == [
        ("qlora", 2, 0.01),
        ("qdora", 2, 0.01),
    ]
    assert [arm["learning_rate_at_edge"] for arm in values["arms"]] == [False, True]
    searched = {run["folder"]: run["eval_loss"] for run in values["search"]}
    assert searched["qdora-rank-2-rate-0.01-seed-0"] < searched["qdora-rank-2-rate-1e-06-seed-0"]
    assert not (finished / "qdora-rank-2-rate-1e-06-seed-1").exists(), "only the best rate has other seeds"
    assert not list(finished.glob("*/checkpoints"))


def test_numbers_are_those_of_the_runs_and_their_evaluations(finished: Path) -> None:
    values = read(finished)
    results = {name: json.loads((finished / name / "evaluation" / "results.json").read_text()) for name in NAMES}
    for arm, names in zip(values["arms"], (NAMES[:2], NAMES[2:]), strict=True):
        losses = [results[name]["loss"] for name in names]
        assert arm["seeds"]["loss"] == pytest.approx(losses)
        assert arm["loss"] == pytest.approx(sum(losses) / 2)
        assert arm["accuracy"] == pytest.approx(sum(results[name]["accuracy"] for name in names) / 2)
        summaries = [summary_of(finished / name) for name in names]
        assert [run["num_tokens"] for run in arm["training"]] == [summary["num_tokens"] for summary in summaries]
    (pair,) = values["differences"]
    assert pair["label"] == "qdora r=2 - qlora r=2"
    assert pair["loss"]["mean"] == pytest.approx(values["arms"][1]["loss"] - values["arms"][0]["loss"])
    assert pair["loss"]["low"] <= pair["loss"]["mean"] <= pair["loss"]["high"]
    assert [*values["bases"]] == ["base-nf4"]
    assert values["bases"]["base-nf4"]["chance"] == 0.5


def test_every_number_is_kept(finished: Path) -> None:
    with gzip.open(finished / "runs.jsonl.gz", "rt") as lines:
        runs = {run["name"]: run for run in map(json.loads, lines)}
    assert runs.keys() == {*NAMES, "qdora-rank-2-rate-1e-06-seed-0"}
    for name, run in runs.items():
        assert run["metrics"] == metrics_of(finished / name)
        assert run["config"]["optim"]["learning_rate"] in (0.01, 1e-6)
    with gzip.open(finished / "samples.csv.gz", "rt") as text:
        rows = list(csv.DictReader(text))
    first = json.loads((finished / NAMES[0] / "evaluation" / "results.json").read_text())["samples"]
    assert [float(row["loss qlora r=2 seed 0"]) for row in rows] == pytest.approx(
        [one["loss"] for one in first], rel=1e-4
    )
    assert [float(row["accuracy qlora r=2 seed 0"]) for row in rows] == [float(one["correct"]) for one in first]
    assert (finished / "study.png").read_bytes().startswith(b"\x89PNG")
    assert "| qdora r=2 - qlora r=2 |" in (finished / "study.md").read_text()


@pytest.mark.parametrize("name", ["data.train", "data.eval", "model.path"])
def test_what_was_replaced_is_no_part_of_a_study_and_what_was_moved_is(
    finished: Path, options: list[str], tmp_path: Path, name: str
) -> None:
    folder = finished / NAMES[0]
    config = RunFolder(folder).read_config()
    moved = Path(shutil.copytree(Path(options_value(options, "data.train")).parent, tmp_path / "moved"))
    config.data.train, config.data.eval = str(moved / "train.jsonl"), str(moved / "tune.jsonl")
    config.model.path = str(moved / "model")
    assert replaced(RunFolder(folder), config) == []
    if name == "model.path":
        make_model(moved / "model", "llama", num_hidden_layers=1, seed=1)
    else:
        file = moved / Path(options_value(options, name)).name
        file.write_text(file.read_text().replace("odd", "even"))
    assert replaced(RunFolder(folder), config) == [name]


def test_run_over_what_was_replaced_is_not_taken_for_finished(finished: Path, tmp_path: Path) -> None:
    folder = RunFolder(Path(shutil.copytree(finished / NAMES[0], tmp_path / "run")))
    config = folder.read_config()
    assert _is_done(folder.path, config)
    config.train.report, config.plan.on_exceed = not config.train.report, OnExceed.off
    assert _is_done(folder.path, config), "neither changes a result"
    summary = json.loads(folder.summary.read_text())
    folder.write_summary({**summary, "data_fingerprints": {"data.train": "another"}})
    with pytest.raises(ConfigError, match=r"what data\.train names is not what it was trained with"):
        _is_done(folder.path, config)


@pytest.mark.nightly
def test_other_options_and_places_are_no_part_of_a_finished_study(
    finished: Path, options: list[str], tmp_path: Path
) -> None:
    copy = shutil.copytree(finished, tmp_path / "study")
    before = read(copy)
    longer = qdora(*options, f"output_dir={copy}", "train.num_steps=4", timeout_s=240)
    assert longer.returncode == 2
    assert "has train.num_steps=3 (now 4)" in longer.stderr.splitlines()[-1]
    assert read(copy) == before
    shutil.rmtree(copy / NAMES[-1] / "evaluation")
    moved = shutil.copytree(options_value(options, "tasks_path"), tmp_path / "moved")
    again = qdora(*options, f"output_dir={copy}", f"tasks_path={moved}", timeout_s=240)
    assert again.returncode == 0, again.stderr[-3000:]
    assert read(copy)["arms"] == before["arms"]


def options_value(options: list[str], name: str) -> str:
    """What an option is set to."""
    return next(text.partition("=")[2] for text in options if text.startswith(f"{name}="))


@pytest.mark.nightly
def test_finished_study_trains_nothing_again(finished: Path, options: list[str]) -> None:
    before = read(finished)
    again = qdora(*options, f"output_dir={finished}", timeout_s=240)
    assert again.returncode == 0
    assert again.stdout.count("is finished already") == 3 + 4
    after = read(finished)
    assert after.pop("config") | {"launcher": []} == before.pop("config") | {"launcher": []}
    assert after == before

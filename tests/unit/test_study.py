"""A study pairs what it compares, and its options reach the runs."""

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qdora.commands import COMMANDS, compose, run, typed
from qdora.commands.members import STOP
from qdora.commands.study import _score_bases
from qdora.config import AdapterMethod, QuantMethod, RunConfig, StudyConfig
from qdora.errors import ConfigError
from qdora.study.cells import Arm, Cell, arms, best_rates, compared, own_options, search, shared_options
from qdora.study.results import _differ_in_one, _pairs, conclude
from qdora.study.statistics import Difference, Scores, differences
from tests.support.models import make_model

NEEDED = ["+study=methods", "model.path=m", "data.train=d", "data.eval=e", "tasks=[obqa]", "tasks_path=t"]
NUM_TRIALS = 200
COVERED = 0.91
"""Least share of 95 % intervals that hold the true difference; 200 trials vary by 1.5 %."""
WIDE = 3.0
"""Times the interval that samples alone would have."""


def study(*overrides: str) -> StudyConfig:
    """The typed configuration."""
    values = compose("study", [*NEEDED, *overrides])
    assert values is not None
    made: StudyConfig = typed(values, COMMANDS["study"].config_class)
    return made


def test_methods_have_their_ranks_and_rates() -> None:
    config = study("ranks=[4,8]", "methods.dora.ranks=[2]", "~methods.full_nf4", "methods.lora.learning_rates=[1e-3]")
    assert arms(config) == [
        Arm("full", None),
        Arm("lora", 4),
        Arm("lora", 8),
        Arm("dora", 2),
        Arm("qlora", 4),
        Arm("qlora", 8),
        Arm("qdora", 4),
        Arm("qdora", 8),
    ]
    rates = [cell.learning_rate for cell in search(config) if cell.arm == Arm("lora", 4)]
    assert rates == [1e-3]
    assert {cell.seed for cell in search(config)} == {0}
    chosen = compared(config, {Arm("dora", 2): 1e-2})
    assert [cell.name for cell in chosen] == [f"dora-rank-2-rate-0.01-seed-{seed}" for seed in (0, 1, 2)]


def test_options_of_a_run_are_those_of_the_study(tmp_path: Path) -> None:
    given = ["data.max_length=77", "adapter.target_modules=[q_proj,v_proj]", "train.num_steps=5", "tracker=none"]
    config = study(*given, "model.path='a b'", "parallel.plan=none", "optim.schedule=linear")
    for method, adapter, quant in (
        ("qdora", AdapterMethod.dora, QuantMethod.nf4),
        ("lora", AdapterMethod.lora, QuantMethod.none),
        ("full_nf4", AdapterMethod.none, QuantMethod.none),
    ):
        cell = Cell(Arm(method, None if method == "full_nf4" else 3), 0.003, 7)
        values = compose("train", [*shared_options(config), *own_options(config, cell, tmp_path)])
        made: RunConfig = typed(values, RunConfig)  # type: ignore[arg-type]
        assert (made.adapter.method, made.quant.method) == (adapter, quant)
        assert (made.optim.learning_rate, made.seed, made.optim.schedule.name) == (0.003, 7, "linear")
        assert (made.data.max_length, made.train.num_steps, made.tracker.kind.name) == (77, 5, "none")
        assert made.adapter.target_modules == ["q_proj", "v_proj"]
        assert made.model.path == (str(tmp_path) if method == "full_nf4" else "a b")
        assert method == "full_nf4" or made.adapter.rank == 3


def test_best_rate_is_the_one_with_the_lowest_finite_loss(tmp_path: Path) -> None:
    others = ("~methods.full", "~methods.full_nf4", "~methods.dora", "~methods.qlora", "~methods.qdora", "ranks=[4]")
    config = study(*others, "methods.lora.learning_rates=[3e-4,1e-3,3e-3,1e-2]")
    ends = (3e-4, 2.5, "finished"), (1e-3, 2.0, "finished"), (3e-3, float("nan"), "finished"), (1e-2, 1.0, "preempted")
    for rate, loss, status in ends:
        folder = tmp_path / Cell(Arm("lora", 4), rate, 0).name
        folder.mkdir()
        summary = {"status": status, "eval_losses": {"0": 3.0, "5": loss}, "peak_memory_gib": [1.0]}
        (folder / "summary.json").write_text(json.dumps(summary))
    assert best_rates(config, tmp_path) == {Arm("lora", 4): 1e-3}


def test_arms_are_compared_that_differ_in_one_thing() -> None:
    config = study("ranks=[4,8]")
    pairs = {
        (plus.label, minus.label)
        for plus in arms(config)
        for minus in arms(config)
        if _differ_in_one(config, plus, minus)
    }
    assert ("dora r=4", "lora r=4") in pairs
    assert ("qdora r=8", "qlora r=8") in pairs
    assert ("qdora r=4", "dora r=4") in pairs
    assert ("qdora r=4", "full_nf4") in pairs
    assert ("dora r=8", "full") in pairs
    for odd in (("lora r=4", "dora r=4"), ("dora r=4", "lora r=8"), ("qdora r=4", "lora r=4"), ("qdora r=4", "full")):
        assert odd not in pairs


def scores(values: Any, tasks: list[int] | None = None) -> Scores:
    """Of (seeds, samples) values, all of the same weight."""
    array = np.asarray(values, dtype=np.float64)
    return Scores(array, np.ones(array.shape[1]), np.asarray(tasks or [0] * array.shape[1]))


def difference(plus: list[Scores], minus: list[Scores], seed: int = 0) -> Difference:
    """Of one pair."""
    (found,) = differences([(plus, minus)], seed)
    return found


def test_difference_of_equal_gaps_has_no_width() -> None:
    base = np.random.default_rng(0).normal(size=(3, 50))
    found = difference([scores(base + 0.25)], [scores(base)])
    assert (found.mean, found.low, found.high) == pytest.approx((0.25, 0.25, 0.25))
    assert found.seeds == pytest.approx([0.25] * 3)


def test_tasks_count_alike_and_tokens_by_their_number() -> None:
    values = np.array([[1.0, 3.0, 10.0]])
    assert scores(values, [0, 0, 1]).each_seed() == [pytest.approx((2.0 + 10.0) / 2)]
    weighted = Scores(values, np.array([3.0, 1.0, 1.0]), np.array([0, 0, 1]))
    assert weighted.each_seed() == [pytest.approx((6 / 4 + 10.0) / 2)]


def test_difference_of_differences_is_that_of_the_four() -> None:
    random = np.random.default_rng(1)
    four = [scores(random.normal(size=(3, 40))) for _ in range(4)]
    found = difference([four[0], four[3]], [four[1], four[2]])
    means = [one.values.mean() for one in four]
    assert found.mean == pytest.approx((means[0] - means[1]) - (means[2] - means[3]))
    assert found.low < found.mean < found.high


@pytest.mark.parametrize("of_seeds", [0.0, 0.1, 1.0])
def test_interval_covers_the_truth_as_often_as_it_says(of_seeds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether samples or seeds make most of the noise; a bootstrap of three seeds would cover three quarters."""
    monkeypatch.setattr("qdora.study.statistics.NUM_DRAWS", 500)
    random = np.random.default_rng(2)
    covered = 0
    for trial in range(NUM_TRIALS):
        shared = random.normal(size=60)
        noise = random.normal(scale=0.5, size=(2, 3, 60)) + random.normal(scale=of_seeds, size=(2, 3, 1))
        found = difference([scores(shared + noise[0] + 0.1)], [scores(shared + noise[1])], seed=trial)
        covered += found.low <= 0.1 <= found.high
    assert covered / NUM_TRIALS >= COVERED


def test_one_seed_has_the_interval_of_its_samples_and_several_a_wider_one_where_they_differ() -> None:
    random = np.random.default_rng(3)
    base = random.normal(size=(1, 400))
    gap = base * 0 + 0.1 + random.normal(scale=0.1, size=(1, 400))
    one = difference([scores(base + gap)], [scores(base)])
    assert one.low < 0.1 < one.high
    assert one.high - one.low == pytest.approx(2 * 1.96 * 0.1 / 20, rel=0.2)
    apart = np.array([[0.0], [0.05], [-0.05]])
    three = difference([scores(base + gap + apart)], [scores(np.repeat(base, 3, 0))])
    assert three.high - three.low > WIDE * (one.high - one.low)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["tasks=[]"], "give tasks=[...] and tasks_path=DIR to compare on"),
        (["optim.learning_rate=1"], "optim.learning_rate: methods, ranks and learning_rates of the study decide that"),
        (["adapter.rank=3"], "adapter.rank: methods, ranks"),
        (["seeds=[1,1]"], "each once"),
        (["ranks=[4,4]"], "ranks=[4, 4]: give one or several, each once and at least 1"),
        (["ranks=[0]"], "ranks=[0]: give one or several"),
        (["methods.dora.ranks=[]"], "methods.dora.ranks=[]: give one or several"),
        (["methods.lora.learning_rates=[]"], "a method of a study needs learning_rates"),
        (["methods.full.quant=nf4"], "4-bit weights cannot be trained"),
        (["methods.qdora.dequantised=true"], "dequantised=true goes with quant=none"),
        (["protocol=generate"], "a study takes likelihood or loss"),
        (["methods.lora.learning_rates=[1e-3,1e-3]"], "above 0, and each once"),
        (["+methods={a-b:{adapter:dora,learning_rates:[1e-3]}}"], "letters, digits and _ alone"),
        (["methods.lora.rnaks=[1]"], "rnaks"),
        (["+study=methodz"], "no such choice"),
    ],
)
def test_mistakes_are_one_line(given: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["study", *(NEEDED if "+study=methodz" not in given else []), *given]) == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1


def test_study_without_results_says_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = study("ranks=[4]", "seeds=[0]")
    assert not conclude(config, tmp_path, {Arm("lora", 4): 1e-3})
    assert "lora-rank-4-rate-0.001-seed-0 has not ended" in capsys.readouterr().out
    assert _pairs(config, []) == []


def test_study_of_losses_alone_has_its_table_and_figure(tmp_path: Path) -> None:
    config = study(
        "ranks=[4]", "protocol=loss", *(f"~methods.{name}" for name in ("full", "full_nf4", "qlora", "qdora"))
    )
    rates = {Arm("lora", 4): 1e-3, Arm("dora", 4): 1e-3}
    losses = {}
    for number, cell in enumerate(compared(config, rates)):
        loss = losses[f"loss {cell.arm.label} seed {cell.seed}"] = 1.0 + 0.01 * number
        _write_results(tmp_path / cell.name / "evaluation", {"loss": loss, "num_label_tokens": 5})
    _write_results(tmp_path / "base-none", {"loss": 3.0, "num_label_tokens": 5})
    assert conclude(config, tmp_path, rates)
    values = json.loads((tmp_path / "study.json").read_text())
    assert [pair["label"] for pair in values["differences"]] == ["dora r=4 - lora r=4"]
    assert "accuracy" not in values["arms"][0]
    assert (tmp_path / "study.png").exists()
    (sample,) = csv.DictReader(gzip.decompress((tmp_path / "samples.csv.gz").read_bytes()).decode().splitlines())
    assert sample.pop("task") == "0"
    assert {name: float(value) for name, value in sample.items()} == pytest.approx(losses)


def test_arms_that_were_scored_on_other_samples_are_not_paired(tmp_path: Path) -> None:
    config = study("ranks=[4]", "seeds=[0]")
    rates = {Arm("lora", 4): 1e-3, Arm("dora", 4): 1e-3}
    for number, cell in enumerate(compared(config, rates)):
        sample = {"loss": 1.0, "num_label_tokens": 5, "correct": True, "where": f"row {number}"}
        _write_results(tmp_path / cell.name / "evaluation", sample)
    with pytest.raises(ConfigError, match="was scored on other samples"):
        conclude(config, tmp_path, rates)


def _write_results(folder: Path, sample: dict[str, Any]) -> None:
    """results.json of one task with one sample."""
    folder.mkdir(parents=True)
    values = {"loss": sample["loss"], "tasks": {"t": {}}, "samples": [{"task": "t", "where": "row 1", **sample}]}
    (folder / "results.json").write_text(json.dumps(values))


def test_base_is_scored_as_the_methods_start_from_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process, which spares two starts."""
    monkeypatch.setattr("qdora.commands.study.evaluate", lambda options, stop, environment: run(["evaluate", *options]))
    model = make_model(tmp_path / "model", "llama", num_hidden_layers=1)
    (tmp_path / "task.jsonl").write_text(json.dumps({"prompt": "1+1=", "completion": "2"}) + "\n")
    config = study(
        *(f"~methods.{name}" for name in ("full_nf4", "dora", "qdora")),
        *("protocol=loss", "tasks=[task]", f"tasks_path={tmp_path}", f"model.path={model}"),
    )
    (tmp_path / STOP).parent.mkdir(exist_ok=True)
    (tmp_path / STOP).touch()
    _score_bases(config, tmp_path)
    bases = [json.loads((tmp_path / f"base-{name}" / "results.json").read_text()) for name in ("none", "nf4")]
    assert [base["quant"] for base in bases] == ["none", "nf4"]
    assert bases[0]["loss"] != bases[1]["loss"]


def test_torchrun_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    from qdora.commands.study import study as start

    with pytest.raises(ConfigError, match="leave out torchrun"):
        start(study())

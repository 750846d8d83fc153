"""Files of tasks are found under the names that people use, and several tasks come to what is published of them."""

import math
from pathlib import Path
from typing import Any

import pytest

from qdora.config import DataConfig, EvaluateConfig, ModelConfig, Protocol
from qdora.errors import ConfigError
from qdora.evaluation.tasks import GROUPS, find_tasks, overall, summary

SHARED = ["boolq", "piqa", "social_i_qa", "hellaswag", "winogrande", "ARC-Easy", "ARC-Challenge", "openbookqa"]
"""File names of LLM-Adapters."""


@pytest.fixture(params=["{}.jsonl.gz", "{}/test.json", "test/{}.jsonl"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A folder of tasks, as three sources have it."""
    for name in [*SHARED, "gsm8k"]:
        file = tmp_path / request.param.format(name)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    (tmp_path / "README.md").touch()
    return tmp_path


def test_groups_and_short_names_find_their_files(folder: Path) -> None:
    found = find_tasks(["commonsense", "gsm8k"], folder)
    assert list(found) == [*GROUPS["commonsense"], "gsm8k"]
    for name, file in zip(SHARED, (found[task] for task in GROUPS["commonsense"]), strict=True):
        assert name in str(file.relative_to(folder))
    for name in ("OBQA", "openbookqa", "OpenBookQA"):
        assert find_tasks([name], folder)[name] == found["obqa"]
    assert find_tasks(["ARC-Challenge", "arc_c"], folder)["arc_c"] == found["arc_challenge"]


def test_arithmetic_is_the_six_tasks_of_llm_adapters(tmp_path: Path) -> None:
    """Under the names of that repository's folders."""
    names = ["gsm8k", "SVAMP", "AddSub", "MultiArith", "mawps", "AQuA"]
    for name in [*names, "SingleEq"]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "test.json").touch()
    found = find_tasks(["arithmetic"], tmp_path)
    assert [file.parent.name for file in found.values()] == names


def test_task_without_a_file_is_told(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"no file for 'bolq' in .*, did you mean 'boolq'"):
        find_tasks(["bolq"], folder)
    with pytest.raises(ConfigError, match="is no folder"):
        find_tasks(["boolq"], folder / "gone")


def test_task_that_two_files_could_be_is_told(folder: Path) -> None:
    (folder / "small").mkdir()
    (folder / "small" / "boolq.jsonl").touch()
    with pytest.raises(ConfigError, match=r"'boolq' may be .* or .*; give a tasks_path that has one of them"):
        find_tasks(["boolq"], folder)


def sample(correct: bool, answer: str, loss: float, tokens: int, place: int = 0) -> dict[str, Any]:
    """As `likelihood_job` records it."""
    kept = {"correct": correct, "correct_normalised": not correct, "answer": answer, "num_choices": 2, "place": place}
    return kept | {"loss": loss, "num_label_tokens": tokens}


def test_summary_is_that_of_a_computation_by_hand() -> None:
    scores = summary([sample(True, "a", 1.0, 1), sample(False, "a", 2.0, 3, place=1), sample(True, "b", 0.5, 4)])
    assert scores["accuracy"] == pytest.approx(2 / 3)
    assert scores["accuracy_normalised"] == pytest.approx(1 / 3)
    assert scores["standard_error"] == pytest.approx(math.sqrt(2 / 3 * 1 / 3 / 3))
    assert (scores["chance"], scores["majority"]) == (0.5, pytest.approx(2 / 3))
    assert scores["loss"] == pytest.approx((1.0 + 6.0 + 2.0) / 8)
    assert scores["perplexity"] == pytest.approx(math.exp(9 / 8))
    assert (scores["num_samples"], scores["num_correct"], scores["num_label_tokens"]) == (3, 2, 8)


@pytest.mark.parametrize(
    ("answers", "places", "majority"), [("aab", (0, 1, 0), 2 / 3), ("abc", (1, 1, 1), 1.0), ("aaa", (0, 1, 2), 1.0)]
)
def test_majority_is_of_the_same_text_or_the_same_place(answers: str, places: tuple[int, ...], majority: float) -> None:
    scores = summary([sample(True, answer, 1.0, 1, place) for answer, place in zip(answers, places, strict=True)])
    assert scores["majority"] == pytest.approx(majority)


def test_mean_of_tasks_is_not_weighted_by_their_size() -> None:
    small, large = summary([sample(True, "a", 1.0, 1)]), summary([sample(False, "a", 3.0, 1)] * 9)
    both = overall({"small": small, "large": large})
    assert (both["accuracy"], both["loss"]) == (0.5, 2.0)
    assert both["perplexity"] == pytest.approx(math.exp(2.0))
    assert (both["num_samples"], both["num_correct"]) == (10, 1)
    errors = [0.1, 0.3]
    some = {str(error): {"accuracy": 0.5, "standard_error": error} for error in errors}
    assert overall(some)["standard_error"] == pytest.approx(math.sqrt(0.01 + 0.09) / 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": ["boolq"]}, r"tasks=\[boolq,...\] and tasks_path=DIR .* go together"),
        ({"tasks_path": "d", "data": DataConfig(eval="e")}, "go together"),
        ({"tasks": ["boolq"], "tasks_path": "d", "data": DataConfig(eval="e")}, "give one of tasks"),
        ({}, "data.eval is not set"),
        ({"protocol": Protocol.harness}, r"protocol=harness needs tasks=\[...\]"),
        ({"protocol": Protocol.harness, "tasks": ["a"], "data": DataConfig(eval="e")}, "data.eval: with protocol"),
    ],
)
def test_contradictions_are_told(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EvaluateConfig(model=ModelConfig(path="m"), **options)

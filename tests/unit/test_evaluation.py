"""Scores are what a computation by hand gives."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qdora.config import DataConfig, DataFormat, Dtype, EvaluateConfig, ModelConfig, Protocol
from qdora.data.encode import encode
from qdora.data.sources import Row
from qdora.errors import ConfigError, DataError
from qdora.evaluation import _right, choices_of, evaluate
from tests.support import make_model

SCORE_TOLERANCE = 1e-5
"""Relative; float32 over padded rows of other lengths."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny float32 Llama."""
    return make_model(tmp_path_factory.mktemp("model"), "llama", dtype=torch.float32)


def score(
    model: Path, rows: list[dict[str, Any]], tmp_path: Path, protocol: Protocol, **options: Any
) -> dict[str, Any]:
    """Evaluates `rows` and reads what was written."""
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = EvaluateConfig(
        model=ModelConfig(path=str(model), dtype=Dtype.float32),
        data=DataConfig(eval=str(file), cache_dir=str(tmp_path / "cache")),
        protocol=protocol,
        output_dir=str(tmp_path / "results"),
        **options,
    )
    assert evaluate(config) == 0
    results: dict[str, Any] = json.loads((tmp_path / "results" / "results.json").read_text())
    return results


@torch.no_grad()
def log_likelihood(model: Path, row: dict[str, Any], form: Any) -> tuple[float, int]:
    """Of the learned tokens, by plain transformers; and their number."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids, learned = encode(Row(row, "x"), form, tokenizer)
    logits = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)(input_ids=torch.tensor([ids])).logits[0]
    log_probabilities = logits.log_softmax(1)
    picked = [float(log_probabilities[place - 1, ids[place]]) for place in range(1, len(ids)) if learned[place]]
    return sum(picked), len(picked)


COMPLETIONS = [{"prompt": "ab", "completion": "c" * n} for n in range(1, 6)]
QUESTIONS = [
    {"prompt": f"{n} is ", "completion": ["even", "odd"][n % 2], "choices": ["even", "odd"], "answer": n % 2}
    for n in range(5)
]


def test_loss_is_the_mean_over_label_tokens(model: Path, tmp_path: Path) -> None:
    parts = [log_likelihood(model, row, DataFormat.completion) for row in COMPLETIONS]
    expected = -sum(total for total, _ in parts) / sum(count for _, count in parts)
    results = score(model, COMPLETIONS, tmp_path, Protocol.loss)
    assert results["loss"] == pytest.approx(expected, rel=SCORE_TOLERANCE)
    assert results["perplexity"] == pytest.approx(math.exp(expected), rel=10 * SCORE_TOLERANCE)
    assert results["num_label_tokens"] == sum(count for _, count in parts)


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_likelihood_scores_each_choice_in_the_words_of_the_answer(model: Path, tmp_path: Path, batch_size: int) -> None:
    results = score(model, QUESTIONS, tmp_path, Protocol.likelihood, batch_size=batch_size)
    for row, sample in zip(QUESTIONS, results["samples"], strict=True):
        for choice, value in sample["scores"].items():
            expected, _ = log_likelihood(model, {**row, "completion": choice}, DataFormat.completion)
            assert value == pytest.approx(expected, rel=SCORE_TOLERANCE)
        assert sample["prediction"] == max(sample["scores"], key=sample["scores"].get)
        assert sample["answer"] == row["choices"][row["answer"]]  # type: ignore[index]
    correct = [sample["prediction"] == sample["answer"] for sample in results["samples"]]
    assert results["accuracy"] == sum(correct) / 5
    assert (results["chance"], results["majority"]) == (0.5, 0.6)


def test_generation_is_that_of_transformers(smollm2: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    theirs = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    rows = [{"instruction": text, "output": "x"} for text in ("Name a colour.", "What is the capital of France?")]
    results = score(smollm2, rows, tmp_path, Protocol.generate, max_new_tokens=12)
    for row, sample in zip(rows, results["samples"], strict=True):
        turns = [{"role": "user", "content": row["instruction"]}]
        given = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        made = theirs.generate(**given, do_sample=False, max_new_tokens=12)[0, given["input_ids"].shape[1] :]
        assert sample["prediction"] == tokenizer.decode(made, skip_special_tokens=True).strip()
    assert "Paris" in results["samples"][1]["prediction"]


def test_limit_scores_only_the_first(model: Path, tmp_path: Path) -> None:
    assert score(model, QUESTIONS, tmp_path, Protocol.likelihood, limit=2)["num_samples"] == 2


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"choices": ["a", "b"], "answer": "b"}, (["a", "b"], "b")),
        ({"choices": ["a", "b"], "answer": 0}, (["a", "b"], "a")),
        ({"instruction": "Is it? Answer format: true/false", "answer": "false"}, (["true", "false"], "false")),
        ({"instruction": "Is it?", "answer": "false"}, None),
        ({"choices": ["a", "b"]}, None),
    ],
)
def test_choices_are_found(values: dict[str, Any], expected: object) -> None:
    assert choices_of(Row(values, "x")) == expected


def test_answer_that_is_no_choice_is_told() -> None:
    with pytest.raises(DataError, match="line 3: the answer 'c' is none of the choices"):
        choices_of(Row({"choices": ["a", "b"], "answer": "c"}, "a.jsonl line 3"))


@pytest.mark.parametrize(
    ("text", "gold", "asked", "right"),
    [
        ("the correct answer is true, not false", "true", (["true", "false"], "true"), True),
        ("false or true", "true", (["true", "false"], "true"), False),
        ("answer12", "answer1", (["answer1", "answer12"], "answer1"), False),
        ("nothing named", "true", (["true", "false"], "true"), False),
        ("I am DEMO Assistant", "Demo", None, True),
        ("I am another", "Demo", None, False),
    ],
)
def test_generated_answer_is_right_by_the_first_choice_named(text: str, gold: str, asked: Any, right: bool) -> None:
    assert _right(Row({"answer": gold}, "x"), text, gold, asked) is right


def test_generated_answer_without_a_key_must_be_equal() -> None:
    row = Row({"prompt": "a", "completion": "b c"}, "x")
    assert _right(row, "b  c", "b c", None)
    assert not _right(row, "b c d", "b c", None)


def test_likelihood_without_choices_is_told(model: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="line 1 is not multiple choice"):
        score(model, COMPLETIONS, tmp_path, Protocol.likelihood)


def test_folder_without_a_run_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no run there"):
        evaluate(EvaluateConfig(run=str(tmp_path), data=DataConfig(eval="x.jsonl")))

"""Scores are what a computation by hand gives."""

import json
import math
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from qdora.adapter import peft_format
from qdora.adapter.dora import adapted_layers
from qdora.adapter.trained_over import write_note
from qdora.config import (
    AdapterConfig,
    AdapterMethod,
    DataConfig,
    DataFormat,
    Dtype,
    EvaluateConfig,
    ModelConfig,
    ParallelConfig,
    Plan,
    Protocol,
    QuantConfig,
    QuantMethod,
    RunConfig,
)
from qdora.data.encode import encode
from qdora.data.sources import Row
from qdora.errors import ConfigError, DataError, ModelError
from qdora.evaluation import evaluate
from qdora.evaluation.ranks import score_all
from qdora.evaluation.scoring import Job, Record, likelihood_job
from qdora.evaluation.tasks import Question, is_right, question_of
from qdora.files import lock
from qdora.model import LoadedModel, load_model
from qdora.model.checkpoint_files import CheckpointFiles
from qdora.model.generate import end_tokens
from qdora.parallel import start_alone
from qdora.run_folder import RunFolder
from tests.support.models import make_model, make_tokenizer

COMMONSENSE = Path(__file__).parent / "commonsense_rows.jsonl"
"""Source and licences: commonsense_rows.md beside it."""
SCORE_TOLERANCE = 2e-5
"""Relative; float32 over padded rows of other lengths: 1.1e-5 has been seen without AVX-512."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny float32 Llama."""
    return make_model(tmp_path_factory.mktemp("model"), "llama", dtype=torch.float32)


def score(
    model: Path,
    rows: list[dict[str, Any]],
    tmp_path: Path,
    protocol: Protocol,
    max_length: int = DataConfig().max_length,
    ignore_keys: Sequence[str] = (),
    columns: dict[str, str] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Evaluates `rows` and reads what was written."""
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    dtype = Dtype.bfloat16 if "run" in options else Dtype.float32  # a run has its own, and the default says so
    config = EvaluateConfig(
        model=ModelConfig(path=str(model), dtype=dtype),
        data=DataConfig(
            eval=str(file),
            cache_dir=str(tmp_path / "cache"),
            max_length=max_length,
            ignore_keys=[*ignore_keys],
            columns=columns or {},
        ),
        protocol=protocol,
        output_dir=str(tmp_path / "results"),
        **options,
    )
    assert evaluate(config) == 0
    results: dict[str, Any] = json.loads((tmp_path / "results" / "results.json").read_text())
    return results


def adapted(model: Path, quant: QuantMethod, adapter: Path) -> LoadedModel:
    """The model with a random adapter, which is also saved to `adapter`."""
    config, world = ModelConfig(path=str(model), dtype=Dtype.float32), start_alone("tests")
    plan = ParallelConfig(plan=Plan.none)
    loaded = load_model(model, config, QuantConfig(method=quant), AdapterConfig(rank=4), plan, world)
    torch.manual_seed(3)
    for layer in adapted_layers(loaded.model).values():
        layer.lora_b.data.normal_(std=0.1)
    loaded.refresh(world.device)
    peft_format.save(loaded.model, adapter, loaded.adapter, str(model), loaded.dtype, world)
    loaded.model.eval()
    return loaded


@torch.no_grad()
def log_likelihood(model: Path, row: dict[str, Any], form: Any) -> list[float]:
    """Of the learned tokens, by plain transformers, each."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids, learned = encode(Row(row, "x"), form, tokenizer)
    logits = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)(input_ids=torch.tensor([ids])).logits[0]
    log_probabilities = logits.log_softmax(1)
    return [float(log_probabilities[place - 1, ids[place]]) for place in range(1, len(ids)) if learned[place]]


COMPLETIONS = [{"prompt": "ab", "completion": "c" * n} for n in range(1, 6)]
QUESTIONS = [
    {"prompt": f"{n} is ", "completion": ["even", "odd"][n % 2], "choices": ["even", "odd"], "answer": n % 2}
    for n in range(5)
]


def test_loss_is_the_mean_over_label_tokens(model: Path, tmp_path: Path) -> None:
    parts = [log_likelihood(model, row, DataFormat.completion) for row in COMPLETIONS]
    expected = -sum(map(sum, parts)) / sum(map(len, parts))
    results = score(model, COMPLETIONS, tmp_path, Protocol.loss)
    assert results["loss"] == pytest.approx(expected, rel=SCORE_TOLERANCE)
    assert results["perplexity"] == pytest.approx(math.exp(expected), rel=10 * SCORE_TOLERANCE)
    assert results["num_label_tokens"] == sum(map(len, parts))
    for sample, part in zip(results["samples"], parts, strict=True):
        assert sample["loss"] == pytest.approx(-sum(part) / len(part), rel=SCORE_TOLERANCE)


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_likelihood_scores_each_choice_in_the_words_of_the_answer(model: Path, tmp_path: Path, batch_size: int) -> None:
    results = score(model, QUESTIONS, tmp_path, Protocol.likelihood, batch_size=batch_size)
    for row, sample in zip(QUESTIONS, results["samples"], strict=True):
        for choice, value in sample["scores"].items():
            *expected, _ = log_likelihood(model, {**row, "completion": choice}, DataFormat.completion)
            assert value == pytest.approx(sum(expected), rel=SCORE_TOLERANCE)  # without the end of the sequence
        assert sample["prediction"] == max(sample["scores"], key=sample["scores"].get)
        assert sample["answer"] == row["choices"][row["answer"]]  # type: ignore[index]
    correct = [sample["prediction"] == sample["answer"] for sample in results["samples"]]
    assert results["accuracy"] == sum(correct) / 5
    assert (results["chance"], results["majority"]) == (0.5, 0.6)


@pytest.mark.parametrize(("choices", "num_forwards"), [(["a", "b", "c"], 2), (["ba", "bb"], 2), (["ab", "bb"], 4)])
def test_choices_that_differ_in_their_last_token_share_a_forward(
    choices: list[str], num_forwards: int, model: Path, tmp_path: Path
) -> None:
    """Two rows, one sequence a forward."""
    loaded = adapted(model, QuantMethod.none, tmp_path / "adapter")
    forwards: list[object] = []
    loaded.blocks[0].register_forward_hook(lambda *_: forwards.append(None))
    rows = [
        Row({"prompt": f"{n}:", "completion": choices[0], "choices": choices, "answer": 0}, f"line {n}") for n in (1, 2)
    ]
    data, tokenizer = DataConfig(format=DataFormat.completion), AutoTokenizer.from_pretrained(model)
    job = likelihood_job(rows, data, tokenizer, batch_size=1, ends=[])
    records = job.score(loaded, [0, 1])
    assert len(forwards) == num_forwards
    assert [len(set(record["scores"].values())) for record in records] == [len(choices)] * 2


def test_rows_are_asked_without_what_is_ignored(model: Path, tmp_path: Path) -> None:
    """As they are trained on."""
    turns = [{"role": "user", "content": "a or b?"}, {"role": "assistant", "content": "a"}]
    row = {"messages": turns, "choices": ["a", "b"], "answer": "a"}
    cases = (({}, []), ({"system": "Be brief."}, ["system"]), ({"system": "Be brief."}, []))
    asked = [
        score(model, [row | more], tmp_path, Protocol.likelihood, ignore_keys=ignored)["samples"][0]["scores"]
        for more, ignored in cases
    ]
    assert asked[0] == asked[1]
    assert asked[0] != asked[2]


@pytest.mark.parametrize("columns", [{"prompt": "question", "completion": "reply"}, {"messages": "chat"}])
def test_task_of_another_format_is_asked_by_its_own_names(
    columns: dict[str, str], model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As after a training whose columns had other names."""
    row = {"instruction": "Even?\n\nAnswer format: true/false", "output": "the answer is true", "answer": "true"}
    for protocol in (Protocol.likelihood, Protocol.generate):
        plain, mapped = (score(model, [row], tmp_path, protocol, columns=one)["samples"] for one in ({}, columns))
        assert mapped == plain
        told = capsys.readouterr().out
        assert told.count("has no column of data.columns, and is read by its own names (1 time, first in") == 1


@pytest.mark.parametrize("protocol", [Protocol.likelihood, Protocol.generate])
def test_keys_that_nothing_reads_are_told_or_refused_as_in_training(
    protocol: Protocol, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    turns = [{"role": "user", "content": "a or b?"}, {"role": "assistant", "content": "a"}]
    row = {"messages": turns, "choices": ["a", "b"], "answer": "a", "id": 3}
    score(model, [row], tmp_path, protocol)
    assert "is not read" not in capsys.readouterr().out
    score(model, [row | {"mood": "good"}], tmp_path, protocol)
    assert "mood is not read (data.ignore_keys=[mood] silences this) (1 time, first in" in capsys.readouterr().out
    for more in ({"label": False}, {"messages": [turns[0] | {"loss_mask": [1]}, turns[1]]}):
        with pytest.raises(DataError, match="is not read, and it may change what is to be learned"):
            score(model, [row | more], tmp_path, protocol)


def test_rows_are_asked_without_the_system_turn_of_the_training_and_that_is_told(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = tmp_path / "trained"
    shutil.copytree(model, trained)
    rows = [
        {"instruction": "a or b?", "output": "a", "answer": "a"},
        {"instruction": "b?", "output": "b", "system": "x"},
    ]
    plain = score(trained, rows, tmp_path, Protocol.generate)
    (tmp_path / "results" / "results.json").unlink()
    write_note(trained, None, system="be kind")
    told = score(trained, rows, tmp_path, Protocol.generate)
    assert told["samples"] == plain["samples"]
    assert "asked without a system turn, which every sample of training had (1 time, first" in told["notes"][0]


@pytest.mark.parametrize("protocol", [Protocol.loss, Protocol.likelihood, Protocol.generate])
def test_mapped_columns_are_scored_as_if_they_had_these_names(protocol: Protocol, model: Path, tmp_path: Path) -> None:
    own = {"prompt": "1 is ", "completion": "odd", "choices": ["even", "odd"], "answer": 1}
    theirs = {"ask": "1 is ", "say": "odd", "options": ["even", "odd"], "gold": 1}
    columns = {"prompt": "ask", "completion": "say", "choices": "options", "answer": "gold"}
    asked = [
        score(model, [row], tmp_path, protocol, columns=named)["samples"]
        for row, named in ((own, {}), (theirs, columns), (own, columns))  # the last one by its own names
    ]
    assert asked[0] == asked[1] == asked[2]


@torch.no_grad()
@pytest.mark.nightly(paths=["qdora/evaluation/*.py"])
def test_likelihood_scores_both_choices_in_the_sentence_of_real_rows(smollm2: Path, tmp_path: Path) -> None:
    """BoolQ and PIQA as LLM-Adapters words them; each score against the logits of the whole conversation."""
    rows = [json.loads(line) for line in COMMONSENSE.read_text().splitlines()]
    results = score(smollm2, rows, tmp_path, Protocol.likelihood, batch_size=8)
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    theirs = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    for row, sample in zip(rows, results["samples"], strict=True):
        choices = {"boolq": ["true", "false"], "piqa": ["solution1", "solution2"]}[row["task"]]
        assert list(sample["scores"]) == choices
        turns = [{"role": "user", "content": row["instruction"]}]
        prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        start = len(tokenizer(prompt)["input_ids"])
        for choice in choices:
            ids = tokenizer(f"{prompt}the correct answer is {choice}", return_tensors="pt")["input_ids"]
            likely = theirs(input_ids=ids).logits[0, start - 1 : -1].log_softmax(1)
            expected = float(likely.gather(1, ids[0, start:, None]).sum())
            assert sample["scores"][choice] == pytest.approx(expected, rel=SCORE_TOLERANCE)
    assert [sample["answer"] for sample in results["samples"]] == [row["answer"] for row in rows]
    assert (results["num_samples"], results["chance"]) == (16, 0.5)


@pytest.mark.parametrize("quant", [QuantMethod.nf4, QuantMethod.none])
def test_adapter_is_scored_over_its_base(
    quant: QuantMethod, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = tmp_path / "adapter"
    loaded = adapted(model, quant, adapter)
    rows = [encode(Row(row, "x"), DataFormat.completion, AutoTokenizer.from_pretrained(model)) for row in COMPLETIONS]
    total, count = 0.0, 0
    for ids, learned in rows:
        with torch.no_grad():
            likely = loaded.model(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(1)
        total -= sum(float(likely[place - 1, ids[place]]) for place in range(1, len(ids)) if learned[place])
        count += sum(learned[1:])
    results = score(model, COMPLETIONS, tmp_path, Protocol.loss, adapter=str(adapter), quant=QuantConfig(method=quant))
    assert results["loss"] == pytest.approx(total / count, rel=SCORE_TOLERANCE)
    assert (results["adapter"], results["quant"]) == (str(adapter), quant.name)
    notice = f"adapter={adapter} is scored over unquantised weights; trained over NF4? add quant=nf4"
    assert capsys.readouterr().out.count(notice) == (quant is QuantMethod.none)
    plain = score(model, COMPLETIONS, tmp_path, Protocol.loss, quant=QuantConfig(method=quant))
    assert "unquantised" not in capsys.readouterr().out
    assert plain["loss"] != pytest.approx(results["loss"], rel=100 * SCORE_TOLERANCE)


def test_run_is_scored_with_its_own_options_but_those_given(model: Path, tmp_path: Path) -> None:
    """Its base was moved, and its length limit cuts the samples."""
    run = RunFolder(tmp_path / "run")
    adapted(model, QuantMethod.nf4, run.adapter)
    run.start(
        RunConfig(
            model=ModelConfig(path="gone", dtype=Dtype.float32),
            data=DataConfig(train="t", max_length=4, limit=1),
        ),
        0,
    )
    results = score(model, COMPLETIONS, tmp_path, Protocol.loss, run=str(run.path))
    alone = score(
        model, COMPLETIONS, tmp_path, Protocol.loss, adapter=str(run.adapter), quant=QuantConfig(), max_length=4
    )
    longer = score(model, COMPLETIONS, tmp_path, Protocol.loss, run=str(run.path), max_length=9)
    assert (results["quant"], results["num_samples"]) == ("nf4", 5)
    assert results["loss"] == alone["loss"]
    assert longer["num_label_tokens"] > results["num_label_tokens"]
    assert "4 truncated (data.max_length=4)" in results["notes"][0]

    run.write_summary({"status": "finished", "model_fingerprint": CheckpointFiles(model).fingerprint()})
    assert score(model, COMPLETIONS, tmp_path / "results", Protocol.loss, run=str(run.path))["num_samples"] == 5
    run.write_summary({"status": "finished", "model_fingerprint": "another"})
    with pytest.raises(ConfigError, match=r"was trained over another model than the one in .*: its weights differ"):
        score(model, COMPLETIONS, tmp_path / "run", Protocol.loss, run=str(run.path))


def test_fully_trained_run_has_no_base_to_move(tmp_path: Path) -> None:
    RunFolder(tmp_path / "run").start(
        RunConfig(
            model=ModelConfig(path="m"),
            quant=QuantConfig(method=QuantMethod.none),
            adapter=AdapterConfig(method=AdapterMethod.none),
            data=DataConfig(train="t", eval="e"),
        ),
        0,
    )
    (tmp_path / "run" / "model").mkdir()
    with pytest.raises(ConfigError, match=r"trained every weight: leave out model\.path"):
        evaluate(EvaluateConfig(run=str(tmp_path / "run"), model=ModelConfig(path="m")))


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


@pytest.mark.parametrize(("named", "expected"), [([2, 5], [2, 5]), ([7, 5], [2, 5, 7]), (7, [2, 7]), (None, [2])])
def test_answer_ends_at_the_tokens_that_tokenizer_and_model_name(
    named: list[int] | int | None, expected: list[int], tmp_path: Path
) -> None:
    tokenizer = make_tokenizer()
    assert tokenizer.eos_token_id == 2
    assert end_tokens(tokenizer, tmp_path) == [2]
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": named}))
    assert end_tokens(tokenizer, tmp_path) == expected


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
        ({"instruction": "How far? Answer Choices: (A) 1 (B) 2 m", "answer": "B"}, (["A", "B"], "B")),
    ],
)
def test_choices_are_found(values: dict[str, Any], expected: Any) -> None:
    assert question_of(Row(values, "x")) == (expected and Question(*expected))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"choices": ["a", "b"], "answer": "c"}, "line 3: the answer 'c' is none of the choices"),
        ({"choices": ["false", "true"], "answer": True}, "line 3: the answer True is none of the choices"),
        ({"choices": [1, 2], "answer": 1}, "line 3: choices must be a list of texts"),
        ({"choices": "ab", "answer": "a"}, "line 3: choices must be a list of texts"),
        ({"choices": ["1", "2"], "answer": 1}, "line 3: answer 1 may be the choice '1' or a place in the list"),
    ],
)
def test_answer_that_is_no_choice_is_told(values: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        question_of(Row(values, "a.jsonl line 3"))


@torch.no_grad()
def test_choice_after_a_blank_is_scored_with_the_blank_that_its_token_has(smollm2: Path, tmp_path: Path) -> None:
    """Many tokenizers have the blank at the end of a prompt in the answer's first token."""
    rows = [{"prompt": "The sky is ", "completion": "blue", "choices": ["blue", "green"], "answer": "blue"}]
    results = score(smollm2, rows, tmp_path, Protocol.likelihood)
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    theirs = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    for choice, value in results["samples"][0]["scores"].items():
        ids = tokenizer(f"The sky is {choice}", return_tensors="pt")["input_ids"]
        likely = theirs(input_ids=ids).logits[0, -2].log_softmax(0)
        assert value == pytest.approx(float(likely[ids[0, -1]]), rel=SCORE_TOLERANCE)
    assert results["samples"][0]["num_label_tokens"] == 1


def test_question_of_messages_without_an_answer_keeps_its_question(model: Path, tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "Is it?"}]
    rows = [{"messages": turns, "choices": ["yes", "no"], "answer": "no"}]
    (sample,) = score(model, rows, tmp_path, Protocol.likelihood)["samples"]
    whole = [{"messages": [*turns, {"role": "assistant", "content": "no"}], "choices": ["yes", "no"], "answer": "no"}]
    (other,) = score(model, whole, tmp_path, Protocol.likelihood)["samples"]
    assert sample["scores"] == other["scores"]


def test_scores_are_made_anew_where_anything_has_changed(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"instruction": "Is it?", "output": "no", "choices": ["yes", "no"], "answer": "no"}]
    folder = tmp_path / "copy"
    shutil.copytree(model, folder)
    score(folder, rows, tmp_path, Protocol.likelihood)
    score(folder, rows, tmp_path, Protocol.likelihood)
    assert "these scores are there already" in capsys.readouterr().out
    template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    score(folder, rows, tmp_path, Protocol.likelihood)
    assert "written to" in capsys.readouterr().out
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    score(folder, rows, tmp_path, Protocol.likelihood)
    assert "written to" in capsys.readouterr().out


def test_scores_are_made_anew_where_the_weights_are_others(model: Path, tmp_path: Path) -> None:
    """Those of the adapter and those of the base, in files of the same names."""
    folder, adapter = tmp_path / "copy", tmp_path / "adapter"
    shutil.copytree(model, folder)
    adapted(model, QuantMethod.none, adapter)
    losses = [score(folder, COMPLETIONS, tmp_path, Protocol.loss, adapter=str(adapter))["loss"]]
    for file in (adapter / peft_format.WEIGHTS, folder / "model.safetensors"):
        halved = {name: tensor / 2 for name, tensor in load_file(file).items()}
        save_file(halved, file, metadata={"format": "pt"})
        losses.append(score(folder, COMPLETIONS, tmp_path, Protocol.loss, adapter=str(adapter))["loss"])
    assert len(set(losses)) == 3


def test_batches_that_were_scored_are_kept_and_the_others_scored(tmp_path: Path) -> None:
    """Of two batches the second lacks a record."""
    asked: list[int] = []

    def score_some(_: LoadedModel, numbers: Sequence[int]) -> list[Record]:
        asked.extend(numbers)
        return [{"number": number} for number in numbers]

    loaded: Any = SimpleNamespace(model=None)
    given = loaded, {"task": Job([1, 2, 3, 4], "", score_some)}, 2, start_alone("test"), tmp_path
    records = score_all(*given)
    assert records == {"task": [{"number": number} for number in range(4)]}
    assert asked == [3, 2, 1, 0]
    file = tmp_path / "rank-0.jsonl"
    first, second = (json.loads(line) for line in file.read_text().split("\n") if line)
    file.write_text(f"{json.dumps(first)}\n{json.dumps(second | {'records': second['records'][:1]})}\n")
    asked.clear()
    assert score_all(*given) == records
    assert asked == [1, 0]


def test_scores_by_another_protocol_are_kept_but_where_the_folder_is_given(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", "llama", dtype=torch.float32)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    options = {"model": ModelConfig(path=str(model), dtype=Dtype.float32), "data": DataConfig(eval=str(rows))}
    assert evaluate(EvaluateConfig(**options, protocol=Protocol.likelihood)) == 0
    before = (model / "evaluation" / "results.json").read_text()
    message = r"has scores of rows with protocol=likelihood: .* output_dir=.*evaluation-loss"
    with pytest.raises(ConfigError, match=message):
        evaluate(EvaluateConfig(**options, protocol=Protocol.loss))
    assert (model / "evaluation" / "results.json").read_text() == before
    there = EvaluateConfig(**options, protocol=Protocol.loss, output_dir=str(model / "evaluation"))
    assert evaluate(there) == 0
    assert json.loads((model / "evaluation" / "results.json").read_text())["protocol"] == "loss"


def test_same_evaluation_is_refused_while_it_is_going_on(model: Path, tmp_path: Path) -> None:
    first = score(model, QUESTIONS, tmp_path, Protocol.likelihood)
    (tmp_path / "results" / "results.json").unlink()
    partial = tmp_path / "results" / f".scored-{first['identity']}"
    partial.mkdir()
    descriptor = os.open(partial, os.O_RDONLY)
    assert lock(descriptor)
    try:
        with pytest.raises(ConfigError, match=r"the same is being scored into .*results: wait, or give another"):
            score(model, QUESTIONS, tmp_path, Protocol.likelihood)
        assert score(model, QUESTIONS, tmp_path, Protocol.likelihood, limit=2)["num_samples"] == 2
        assert partial.exists()
    finally:
        os.close(descriptor)
    assert score(model, QUESTIONS, tmp_path, Protocol.likelihood) == first


def test_generated_answers_are_judged_anew_by_other_choices(model: Path, tmp_path: Path) -> None:
    row = {"prompt": "1+1=", "completion": "2", "choices": ["2", "3"], "answer": "2"}
    assert score(model, [row], tmp_path, Protocol.generate, max_new_tokens=2)["chance"] == 0.5
    more = row | {"choices": ["2", "3", "4", "5"]}
    assert score(model, [more], tmp_path, Protocol.generate, max_new_tokens=2)["chance"] == 0.25


def test_rows_beyond_the_context_and_odd_characters_are_told_and_kept(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    context = json.loads((model / "config.json").read_text())["max_position_embeddings"]
    rows = [
        {"prompt": "a\u2028 5 \u2028b", "completion": "2", "answer": "\ud83d"},
        {"prompt": "so " * (context // 3 + 5), "completion": "2", "answer": "2"},
    ]
    results = score(model, rows, tmp_path, Protocol.generate, max_new_tokens=2)
    told = f"rows: 1 of 2 samples are longer than the model's context of {context} tokens"
    assert results["notes"] == [told]
    assert told in capsys.readouterr().out
    assert results["samples"][0]["answer"] == "\ud83d"


def test_folder_that_cannot_be_made_is_told_before_the_model_is_loaded(model: Path, tmp_path: Path) -> None:
    (tmp_path / "results").touch()
    with pytest.raises(ConfigError, match=r"output_dir=.*results cannot be made: Not a directory"):
        score(model, QUESTIONS, tmp_path, Protocol.likelihood)


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [("lm_head.weight", 5, "changes its logits"), ("model.embed_tokens.weight", 23, "not finite")],
    ids=["all tokens", "the token of 3"],
)
def test_weights_that_do_not_compute_have_no_score(
    name: str, row: int, message: str, model: Path, tmp_path: Path
) -> None:
    """What every forward meets shows when the model is loaded, the rest when it is scored."""
    folder = tmp_path / "copy"
    shutil.copytree(model, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors[name][row] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=message):
        score(folder, QUESTIONS, tmp_path, Protocol.likelihood)


@pytest.mark.parametrize(
    ("text", "values", "right"),
    [
        ("the correct answer is true, not false", {"choices": ["true", "false"], "answer": "true"}, True),
        ("false or true", {"choices": ["true", "false"], "answer": "true"}, False),
        ("answer12", {"choices": ["answer1", "answer12"], "answer": "answer1"}, False),
        ("nothing named", {"choices": ["true", "false"], "answer": "true"}, False),
        ("The answer is B.", {"instruction": "? Answer Choices: (A) 1 (B) 2", "answer": "B"}, True),
        ("A bit of thought: C", {"instruction": "? Answer Choices: (A) 1 (C) 2", "answer": "C"}, False),
        ("I am DEMO Assistant", {"answer": "Demo"}, True),
        ("I am another", {"answer": "Demo"}, False),
        ("6 * 4 = 24\nThe answer is 24.", {"answer": "24"}, True),
        ("that makes 1,200", {"answer": "1200"}, True),
        ("24, or rather 25", {"answer": "24"}, False),
        ("it is 240", {"answer": "24"}, False),
        ("$3.50", {"answer": "3.5"}, True),
        ("-7", {"answer": "7"}, False),
        ("no number", {"answer": "7"}, False),
        ("I know: yes", {"choices": ["no", "yes"], "answer": "no"}, False),
        ("a large one", {"answer": "A"}, True),
        ("Data", {"answer": "A"}, False),
        ("答案是北京。", {"answer": "北京"}, True),
    ],
)
def test_generated_answer_is_right_by_what_it_names(text: str, values: dict[str, Any], right: bool) -> None:
    assert is_right(Row(values, "x"), DataFormat.instruction, text) is right


def test_generated_answer_without_a_key_must_be_equal() -> None:
    row = Row({"prompt": "a", "completion": "b c"}, "x")
    assert is_right(row, DataFormat.completion, "b  c")
    assert not is_right(row, DataFormat.completion, "b c d")


def test_likelihood_without_choices_is_told(model: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="line 1 is not multiple choice"):
        score(model, COMPLETIONS, tmp_path, Protocol.likelihood)


def test_folder_without_a_run_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no run there"):
        evaluate(EvaluateConfig(run=str(tmp_path), data=DataConfig(eval="x.jsonl")))

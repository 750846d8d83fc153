"""Scores agree with lm-evaluation-harness on a task that both have."""

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qdora import parallel
from qdora.commands import run
from qdora.config import DataConfig, Dtype, EvaluateConfig, ModelConfig, ParallelConfig, Plan, Protocol
from qdora.errors import ConfigError
from qdora.evaluation import evaluate
from qdora.evaluation.harness import Answers
from tests.support.marks import nightly_but
from tests.support.models import make_model
from tests.support.processes import interrupt_when, qdora

ROWS = Path(__file__).parent.parent / "unit" / "commonsense_rows.jsonl"
SCORE_TOLERANCE = 1e-4
"""Relative; float32 over batches of other shapes."""
TASK = """task: qdora_commonsense
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
metric_list:
  - metric: acc
  - metric: acc_norm
"""

ONE_ANSWER = """task: one_answer
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: generate_until
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{completion}}}}"
generation_kwargs:
  max_gen_toks: 8
  until: ["never"]
metric_list:
  - metric: exact_match
"""


def results(config: EvaluateConfig) -> dict[str, Any]:
    """What the evaluation writes."""
    assert evaluate(config) == 0
    values: dict[str, Any] = json.loads((Path(str(config.output_dir)) / "results.json").read_text())
    return values


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Writes tasks into a folder, which it returns; their data is kept beside it."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))

    def write(*texts: str) -> Path:
        folder = tmp_path / "tasks"
        folder.mkdir()
        for number, text in enumerate(texts):
            (folder / f"{number}.yaml").write_text(text)
        return folder

    return write


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    """BoolQ and PIQA without a chat template, with the words of the choices, so that their lengths differ."""
    rows = []
    for row in map(json.loads, ROWS.read_text().splitlines()):
        choices = [" true", " false"] if row["task"] == "boolq" else [" the first one", " the second solution"]
        gold = ["true", "false", "solution1", "solution2"].index(row["answer"]) % 2
        prompt = f"{row['instruction']}\n\nthe correct answer is"
        rows.append({"prompt": prompt, "completion": choices[gold], "choices": choices, "answer": gold})
    file = tmp_path / "questions.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.mark.nightly(paths=["qdora/evaluation/*.py"])
def test_likelihoods_are_those_of_the_harness(
    smollm2: Path, questions: Path, tasks: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tasks(TASK.format(file=questions))
    model = ModelConfig(path=str(smollm2), dtype=Dtype.float32)
    data = DataConfig(eval=str(questions), cache_dir=str(tmp_path / "cache"))
    output = str(tmp_path / "ours")
    ours = results(
        EvaluateConfig(model=model, data=data, protocol=Protocol.likelihood, batch_size=5, output_dir=output)
    )
    theirs = results(
        EvaluateConfig(
            model=model,
            tasks=["qdora_commonsense"],
            tasks_path=str(folder),
            protocol=Protocol.harness,
            output_dir=str(tmp_path / "theirs"),
        )
    )
    assert len(ours["samples"]) == len(theirs["samples"]) == 16
    for own, other in zip(ours["samples"], theirs["samples"], strict=True):
        assert own["scores"] == pytest.approx(other["scores"], rel=SCORE_TOLERANCE)
    scores = theirs["tasks"]["qdora_commonsense"]
    assert scores["accuracy"] == ours["accuracy"] == scores["harness"]["acc"]
    assert scores["accuracy_normalised"] == ours["accuracy_normalised"]
    assert ours["accuracy"] != ours["accuracy_normalised"], "these rows would not show a mistake of the normalisation"


def test_two_ranks_that_share_a_model_answer_as_one_also_where_one_has_no_sample(
    questions: Path, tasks: Callable[..., Path], tmp_path: Path
) -> None:
    """Tied ends in NF4, whose weights the harness asks to tie."""
    tiny = make_model(tmp_path / "tiny", "llama", num_hidden_layers=1, tie_word_embeddings=True)
    single = tmp_path / "single.jsonl"
    single.write_text(questions.read_text().splitlines()[0] + "\n")
    folder = tasks(TASK.format(file=questions), ONE_ANSWER.format(file=single))
    arguments = [f"model.path={tiny}", "protocol=harness", f"tasks_path={folder}", "model.dtype=float32"]
    arguments += ["tasks=[qdora_commonsense,one_answer]", "batch_size=2", "quant=nf4", "quant.embeddings=true"]
    assert run(["evaluate", *arguments, f"output_dir={tmp_path}/1"]) == 0
    done = qdora("evaluate", *arguments, "sharded=true", f"output_dir={tmp_path}/2", nproc=2)
    assert done.returncode == 0, done.stderr
    one, two = (json.loads((tmp_path / str(nproc) / "results.json").read_text()) for nproc in (1, 2))
    assert two["tasks"]["one_answer"] == one["tasks"]["one_answer"]
    assert two["tasks"]["qdora_commonsense"]["accuracy"] == one["tasks"]["qdora_commonsense"]["accuracy"]
    assert len(two["samples"]) == len(one["samples"]) == 17
    for sample, alone in zip(two["samples"], one["samples"], strict=True):
        assert sample | {"scores": None} == alone | {"scores": None}
        assert sample.get("scores", {}) == pytest.approx(alone.get("scores", {}), rel=SCORE_TOLERANCE)
    assert done.stdout.count("written to") == 1


def test_killed_one_goes_on_with_what_was_answered(questions: Path, tasks: Callable[..., Path], tmp_path: Path) -> None:
    """An answer that is changed meanwhile shows that it was not asked for again."""
    tiny = make_model(tmp_path / "tiny", "llama", num_hidden_layers=1)
    folder = tasks(TASK.format(file=questions), ONE_ANSWER.format(file=questions))
    arguments = [f"model.path={tiny}", "protocol=harness", f"tasks_path={folder}", "model.dtype=float32"]
    arguments += ["tasks=[qdora_commonsense,one_answer]", "batch_size=1", f"output_dir={tmp_path}/scores"]

    def is_time() -> bool:
        """All 32 choices, and some answers, are there."""
        files = (tmp_path / "scores").glob(".scored-*/harness-0.jsonl")
        return any(len(file.read_text().splitlines()) >= 40 for file in files)

    interrupt_when(is_time, ["evaluate", *arguments], signal.SIGKILL)
    (file,) = (tmp_path / "scores").glob(".scored-*/harness-0.jsonl")
    lines = file.read_text().splitlines()
    answers = [json.loads(line) for line in lines[:-1] if line]
    changed = [
        {key: [-123.0, False] if isinstance(value, list) else "so it is" for key, value in one.items()}
        for one in answers
    ]
    hostile = ["5", "null", "[1, 2]", "[" * 10_000, "\0", *(json.dumps({key: 5}) for key in answers[0])]
    file.write_text("\n".join([*hostile, *map(json.dumps, changed), lines[-1][:-20]]))
    assert run(["evaluate", *arguments]) == 0
    samples = json.loads((tmp_path / "scores" / "results.json").read_text())["samples"]
    choices, texts = ([one for one in samples if one["task"] == task] for task in ("qdora_commonsense", "one_answer"))
    assert [score for one in choices for score in one["scores"].values()] == [-123.0] * 32
    assert sum(one["prediction"] == "so it is" for one in texts) == len(answers) - 32 < 16
    assert not list((tmp_path / "scores").glob(".scored-*"))


def test_records_say_what_each_choice_got(questions: Path, tasks: Callable[..., Path], tmp_path: Path) -> None:
    """Where each is asked without its prompt too, and where answers are lists of texts."""
    tiny = make_model(tmp_path / "tiny", "llama", num_hidden_layers=1)
    take = """repeats: 2
filter_list:
  - name: both
    filter:
      - function: take_first_k
        k: 2
"""
    mutual = TASK.replace("qdora_commonsense", "mutual").replace("acc_norm", "acc_mutual_info")
    folder = tasks(*(text.format(file=questions) for text in (TASK, mutual, ONE_ANSWER + take)))
    arguments = [f"model.path={tiny}", "protocol=harness", f"tasks_path={folder}", "model.dtype=float32"]
    arguments += ["tasks=[qdora_commonsense,mutual,one_answer]", f"output_dir={tmp_path}/scores", "limit=4"]
    assert run(["evaluate", *arguments]) == 0
    samples = json.loads((tmp_path / "scores" / "results.json").read_text())["samples"]
    plain, mutual_ones, texts = (
        [one for one in samples if one["task"] == task] for task in ("qdora_commonsense", "mutual", "one_answer")
    )
    for one, other in zip(plain, mutual_ones, strict=True):
        assert one["scores"] == pytest.approx(other["scores"], rel=SCORE_TOLERANCE)
        assert one["prediction"] == other["prediction"]
    assert all(one["prediction"][0] == one["prediction"][1] for one in texts), "greedy answers are the same each time"


def test_answers_that_are_drawn_are_not_kept(tmp_path: Path) -> None:
    world = parallel.start(ParallelConfig(plan=Plan.none))
    kept = Answers(tmp_path, world)
    kinds: list[dict[str, Any]] = [
        {},
        {"do_sample": True},
        {"temperature": 1.5},
        {"do_sample": False, "temperature": 1.5},
    ]
    for options in kinds:
        kept.add_partial("generate_until", ("so", options), "it is")
    kept.close()
    again = Answers(tmp_path, world)
    assert [again.find("generate_until", ("so", options)) for options in kinds] == ["it is", None, None, "it is"]
    again.close()


MISTAKES = {
    "has no task 'no_such_task'": ("no_such_task", ""),  # this and the next two read all tasks of the harness
    "has no task 'qdora_common*'": ("qdora_common*", ""),
    "could not ask arc_easy: ": ("arc_easy", ""),  # the harness's own, beside a folder; without a network
    "tasks_path=.*/none is no folder": ("qdora_commonsense", "none"),
    "could not ask qdora_commonsense: .*JSON": ("qdora_commonsense", "torn"),
    "could not ask qdora_commonsense: KeyError": ("qdora_commonsense", "split"),
}


@pytest.mark.parametrize("message", nightly_but([*MISTAKES][:1] + [*MISTAKES][3:], MISTAKES))
def test_mistakes_in_tasks_are_told(
    message: str, smollm2: Path, questions: Path, tasks: Callable[..., Path], tmp_path: Path
) -> None:
    task, what = MISTAKES[message]
    text = TASK.replace("test_split: test", "test_split: none") if what == "split" else TASK
    folder = tasks(text.format(file=questions))
    if what == "torn":
        questions.write_text(questions.read_text()[:-20])
    path = tmp_path / "none" if what == "none" else folder
    model, own = ModelConfig(path=str(smollm2)), {"tasks_path": str(path), "output_dir": str(tmp_path / "scores")}
    with pytest.raises(ConfigError, match=message.replace("*'", r"\*'")):
        evaluate(EvaluateConfig(model=model, tasks=[task], protocol=Protocol.harness, **own))

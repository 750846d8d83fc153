"""Evaluation of several tasks: the same on one rank and on two, and after it was killed."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from qdora.commands import run
from qdora.files import lock, write_durably
from tests.support.faults import fill, small_disk
from tests.support.processes import interrupt_when, qdora
from tests.support.runs import QUICK

KILL_AFTER_BATCHES = 4


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tasks with choices, with prompts of all lengths."""
    folder = tmp_path_factory.mktemp("tasks")
    for task, sizes in (("parity", range(40)), ("sign", range(-25, 25))):
        rows = []
        for n in sizes:
            choices = ["even", "odd"] if task == "parity" else ["negative", "none", "positive"]
            gold = n % 2 if task == "parity" else (n > 0) - (n < 0) + 1
            prompt = f"{'so ' * (abs(n) * 7 % 11)}{n} is "
            rows.append({"prompt": prompt, "completion": choices[gold], "choices": choices, "answer": gold})
        (folder / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def options(tiny: Path, tasks: Path, output: Path) -> list[str]:
    """Of every evaluation here."""
    own = ["quant=nf4", "protocol=likelihood", "batch_size=4", f"output_dir={output}"]
    return ["evaluate", f"model.path={tiny}", f"tasks_path={tasks}", "tasks=[parity,sign]", *own]


def results(output: Path) -> dict[str, Any]:
    """What was written."""
    values: dict[str, Any] = json.loads((output / "results.json").read_text())
    return values


@pytest.fixture(scope="module")
def whole(tiny: Path, tasks: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the evaluation on one rank."""
    output = tmp_path_factory.mktemp("whole")
    done = qdora(*options(tiny, tasks, output))
    assert done.returncode == 0, done.stderr[-3000:]
    return output


def test_tasks_have_their_own_scores_and_samples_keep_their_order(whole: Path, tasks: Path) -> None:
    found = results(whole)
    assert [found["tasks"][task]["num_samples"] for task in ("parity", "sign")] == [40, 50]
    assert found["tasks"]["sign"]["chance"] == pytest.approx(1 / 3)
    assert found["accuracy"] == pytest.approx(sum(scores["accuracy"] for scores in found["tasks"].values()) / 2)
    places = [
        f"{tasks / task}.jsonl line {line}"
        for task, count in (("parity", 40), ("sign", 50))
        for line in range(1, count + 1)
    ]
    assert [sample["where"] for sample in found["samples"]] == places
    assert found["samples"][3]["answer"] == "odd"
    prompts = [json.loads(line)["prompt"] for line in (tasks / "parity.jsonl").read_text().splitlines()]
    for sample, prompt in zip(found["samples"], prompts, strict=False):
        assert sample["prompt"].replace(" ", "").endswith(prompt.replace(" ", ""))
        assert sample["prediction"] in sample["scores"]
    assert not list(whole.glob(".scored-*"))


@pytest.mark.parametrize("sharded", [False, True], ids=["copies", "shards"])
def test_two_ranks_score_the_same_bit_for_bit(
    whole: Path, tiny: Path, tasks: Path, tmp_path: Path, sharded: bool
) -> None:
    done = qdora(*options(tiny, tasks, tmp_path), f"sharded={sharded}", nproc=2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert results(tmp_path) == results(whole)
    assert done.stdout.count("written to") == 1
    assert ("each of 2 ranks holds 50% of" in done.stdout) == sharded


def test_ranks_that_share_a_copy_answer_as_one_with_a_copy(tiny: Path, data: Path, tasks: Path, tmp_path: Path) -> None:
    """Of a DoRA run, and with more forwards on one rank than on the other: three batches."""
    run = ["train", f"model.path={tiny}", f"data.train={data}", "optim.learning_rate=1e-2", "tracker=none", *QUICK]
    assert qdora(*run, "data.packing=false", "train.num_steps=3", f"output_dir={tmp_path}/run").returncode == 0
    asked = [f"run={tmp_path}/run", f"tasks_path={tasks}", "tasks=[parity]", "limit=9", "protocol=generate"]
    for nproc in (1, 2):
        given = [*asked, "batch_size=4", f"sharded={nproc == 2}", f"output_dir={tmp_path}/{nproc}"]
        done = qdora("evaluate", *given, nproc=nproc)
        assert done.returncode == 0, done.stderr[-3000:]
    one, two = (results(tmp_path / str(nproc)) for nproc in (1, 2))
    assert one == two
    assert len({len(sample["prediction"]) for sample in one["samples"]}) > 1


def test_killed_evaluation_goes_on_with_what_it_had_scored(
    whole: Path, tiny: Path, tasks: Path, tmp_path: Path
) -> None:
    def is_time() -> bool:
        return any(kept(file) >= KILL_AFTER_BATCHES for file in tmp_path.glob(".scored-*/rank-0.jsonl"))

    interrupt_when(is_time, options(tiny, tasks, tmp_path), signal.SIGKILL)
    (file,) = tmp_path.glob(".scored-*/rank-0.jsonl")
    assert kept(file) >= KILL_AFTER_BATCHES
    lines = [json.loads(line) for line in file.read_text().splitlines()[:-1] if line]
    for line in lines:  # shows which were not scored again
        line["records"] = [record | {"prediction": "as kept"} for record in line["records"]]
    file.write_text("\n".join([*map(json.dumps, lines), '{"batch": 9, "rec']))  # torn: it had not got to the disk
    assert not (tmp_path / "results.json").exists()
    done = qdora(*options(tiny, tasks, tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    found, expected = results(tmp_path), results(whole)
    as_kept = [number for number, sample in enumerate(found["samples"]) if sample["prediction"] == "as kept"]
    assert len(as_kept) == sum(len(line["records"]) for line in lines) < len(found["samples"])
    for number in as_kept:
        found["samples"][number]["prediction"] = expected["samples"][number]["prediction"]
    assert found == expected
    again = qdora(*options(tiny, tasks, tmp_path))
    assert again.returncode == 0
    assert "these scores are there already" in again.stdout
    other = qdora(*options(tiny, tasks, tmp_path), "limit=3")
    assert "written to" in other.stdout, "other options are another evaluation"
    assert results(tmp_path)["num_samples"] == 6


def test_terminated_evaluation_says_that_it_goes_on(
    whole: Path,
    tiny: Path,
    tasks: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def write(*arguments: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        write_durably(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr("qdora.evaluation.run.write_durably", write)
        status = run(options(tiny, tasks, tmp_path))
    assert status == 75
    assert capsys.readouterr().err.count("qdora: interrupted at once; the same command goes on") == 1
    assert not (tmp_path / "results.json").exists()
    assert qdora(*options(tiny, tasks, tmp_path)).returncode == 0
    assert results(tmp_path) == results(whole)


def test_full_disk_is_told_and_another_start_goes_on(whole: Path, tiny: Path, tasks: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    with small_disk(disk, "1m"):
        ballast = fill(disk)
        done = qdora(*options(tiny, tasks, disk / "scores"))
        assert done.returncode == 2, done.stderr
        assert "No space left on device" in done.stderr
        assert "Traceback" not in done.stderr
        ballast.unlink()
        assert qdora(*options(tiny, tasks, disk / "scores")).returncode == 0
        assert results(disk / "scores") == results(whole)


def test_what_others_have_scored_is_left_to_them(tiny: Path, tasks: Path, tmp_path: Path) -> None:
    """While they do; what none works on any more goes, as no start will."""
    theirs, left = tmp_path / ".scored-theirs", tmp_path / ".scored-left"
    for folder in (theirs, left):
        folder.mkdir()
    descriptor = os.open(theirs, os.O_RDONLY)
    assert lock(descriptor)
    try:
        assert qdora(*options(tiny, tasks, tmp_path), "limit=2").returncode == 0
    finally:
        os.close(descriptor)
    assert [*tmp_path.glob(".scored-*")] == [theirs]


def test_hostile_lines_are_passed_over(whole: Path, tiny: Path, tasks: Path, tmp_path: Path) -> None:
    partial = tmp_path / f".scored-{results(whole)['identity']}"
    partial.mkdir()
    hostile = ["5", "{}", "null", "[" * 10_000, '{"batch": 0, "records": null}', '{"batch": 0, "records": []}']
    hostile += [
        '{"batch": 0, "records": [5, 5, 5, 5]}',
        '{"batch": 999, "records": [{}]}',
        '{"batch": -1, "records": [{}]}',
    ]
    (partial / "rank-0.jsonl").write_text("\n".join(hostile))
    done = qdora(*options(tiny, tasks, tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    assert results(tmp_path) == results(whole)


def kept(file: Path) -> int:
    """How many batches are kept in it."""
    return file.read_text(errors="replace").count('"batch"')

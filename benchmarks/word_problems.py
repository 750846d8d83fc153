"""benchmarks/word_problems.py DATA OUTPUT: word problems whose choices are the four operations, for a study.

DATA has train/mawps, test/mawps and test/AddSub (.jsonl or .jsonl.gz) as rows of LLM-Adapters (arXiv:2304.01933) whose
`output` is `70 - 27 = 43`, a new line and `The answer is 43.`. OUTPUT gets train_mix.jsonl, the training rows as they
are, and test/TASK.jsonl: every question that one operation on two numbers, the second not 0, answers. Its choices are
what +, -, * and / make of the two numbers, in that order; its answer is the right one.
"""

import argparse
import json
import operator
import re
from pathlib import Path
from typing import Any

from qdora.data.sources import load_rows
from qdora.errors import DataError

TASKS = ("mawps", "AddSub")
OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}
EQUATION = re.compile(r"(?P<first>[\d.]+) (?P<sign>[-+*/]) (?P<second>[\d.]+) = -?[\d.]+\nThe answer is -?[\d.]+\.")


def read_rows(file: Path) -> list[dict[str, Any]]:
    """The rows of a file, or of its packed form."""
    packed = file.with_name(file.name + ".gz")
    return [row.values for row in load_rows(str(packed if packed.exists() else file))]


def with_choices(row: dict[str, Any]) -> dict[str, Any] | None:
    """The row with its choices, or None where its answer is not one operation on two numbers, or cannot be divided."""
    found = EQUATION.fullmatch(row["output"])
    if found is None or not float(found["second"]):
        return None
    texts = {}
    for sign, operation in OPERATIONS.items():
        value = operation(float(found["first"]), float(found["second"]))
        shown = f"{value:.6f}".rstrip("0").rstrip(".")  # as the rows have it: no choice is to be known by its form
        texts[sign] = f"{found['first']} {sign} {found['second']} = {shown}\nThe answer is {shown}."
    if texts[found["sign"]] != row["output"]:
        raise ValueError(f"{row['output']!r} would be {texts[found['sign']]!r}")
    return row | {"choices": [*texts.values()], "answer": row["output"]}


def main() -> None:
    """Writes the files."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("data", type=Path, help="folder with train/ and test/")
    parser.add_argument("output", type=Path, help="folder that the files go to")
    options = parser.parse_args()
    try:
        train = read_rows(options.data / "train" / "mawps.jsonl")
        tests = {task: read_rows(options.data / "test" / f"{task}.jsonl") for task in TASKS}
        asked = {task: [*filter(None, map(with_choices, rows))] for task, rows in tests.items()}
    except (DataError, ValueError, KeyError) as error:
        parser.error(f"{options.data} has no such rows: {error}")
    (options.output / "test").mkdir(parents=True, exist_ok=True)
    for name, rows in {"train_mix": train, **{f"test/{task}": rows for task, rows in asked.items()}}.items():
        path = options.output / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    for task, rows in asked.items():
        print(f"{task}: {len(rows)} of {len(tests[task])} questions are one operation", flush=True)


if __name__ == "__main__":
    main()

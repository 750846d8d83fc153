"""benchmarks/word_problems.py on rows written by hand."""

import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.support.processes import ROOT

SCRIPT = str(ROOT / "benchmarks" / "word_problems.py")


def row(output: str) -> dict[str, Any]:
    """As LLM-Adapters has it, with an equation."""
    return {"instruction": "How many?", "output": output, "answer": "0", "task": "mawps"}


def make(data: Path, output: Path) -> subprocess.CompletedProcess[str]:
    """Runs the script."""
    return subprocess.run([sys.executable, SCRIPT, str(data), str(output)], capture_output=True, text=True)


def test_questions_of_one_operation_get_four_choices(tmp_path: Path) -> None:
    outputs = [
        "70 - 27 = 43\nThe answer is 43.",
        "(1 + 2) - 3 = 0\nThe answer is 0.",
        "3000000 / 0.5 = 6000000\nThe answer is 6000000.",
        "The answer is 5.",
    ]
    text = "".join(json.dumps(row(output)) + "\n" for output in outputs)
    for folder in ("train", "test"):
        (tmp_path / folder).mkdir()
    (tmp_path / "train" / "mawps.jsonl").write_text(text)
    (tmp_path / "test" / "AddSub.jsonl").write_text(text)
    (tmp_path / "test" / "mawps.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    done = make(tmp_path, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "train_mix.jsonl").read_text() == text
    for task in ("mawps", "AddSub"):
        rows = [json.loads(line) for line in (tmp_path / "out" / "test" / f"{task}.jsonl").read_text().splitlines()]
        assert [one["answer"] for one in rows] == [outputs[0], outputs[2]]
        assert rows[0]["choices"] == [
            "70 + 27 = 97\nThe answer is 97.",
            "70 - 27 = 43\nThe answer is 43.",
            "70 * 27 = 1890\nThe answer is 1890.",
            "70 / 27 = 2.592593\nThe answer is 2.592593.",
        ]
        assert rows[1]["choices"][3] == outputs[2]


def test_folder_without_the_rows_is_told(tmp_path: Path) -> None:
    done = make(tmp_path, tmp_path / "out")
    assert done.returncode == 2
    assert "has no such rows" in done.stderr
    assert "mawps.jsonl" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()

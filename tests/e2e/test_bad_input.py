"""Mistakes as a user makes them: one line on rank 0, exit status 2, no traceback, nothing left hanging."""

import json
from pathlib import Path

import pytest

from tests.support import make_model, qdora

GOOD = {"prompt": "a", "completion": "b"}


def write_rows(file: Path, *lines: object) -> Path:
    """A jsonl file; strings are written as they are."""
    file.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return file


@pytest.fixture
def mistakes(tiny: Path, data: Path, tmp_path: Path) -> dict[str, tuple[list[str], str]]:
    """Arguments and the words that must be told, by name."""
    model, train = f"model.path={tiny}", f"data.train={data}"
    pickled = make_model(tmp_path / "pickled", "llama", num_hidden_layers=1)
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    cut = make_model(tmp_path / "cut", "llama", num_hidden_layers=1)
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:-64])
    small = make_model(tmp_path / "small", "llama", num_hidden_layers=1, vocab_size=50)
    remote = make_model(tmp_path / "remote", "llama", num_hidden_layers=1)
    config = json.loads((remote / "config.json").read_text())
    auto_map = {"AutoConfig": "mine.C", "AutoModelForCausalLM": "mine.M"}
    (remote / "config.json").write_text(json.dumps(config | {"model_type": "mine", "auto_map": auto_map}))
    (remote / "mine.py").write_text("raise SystemExit('this must not run')\n")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    broken = write_rows(tmp_path / "broken.jsonl", GOOD, '{"prompt": "a", "compl')
    mixed = write_rows(tmp_path / "mixed.jsonl", GOOD, {"prompt": "a", "answer": "b"})
    empty = write_rows(tmp_path / "empty.jsonl")
    long = write_rows(tmp_path / "long.jsonl", {"prompt": "a" * 2000, "completion": "b"})
    return {
        "unknown option": (["adapter.rnak=3"], "there is no option adapter.rnak, did you mean 'adapter.rank'?"),
        "wrong type": (["adapter.rank=many"], "adapter.rank: Value 'many'"),
        "contradiction": ([train, model, "adapter=none"], "4-bit weights cannot be trained"),
        "missing data": ([model, "data.train=absent.jsonl"], "no such data file or folder: absent.jsonl"),
        "empty data": ([model, f"data.train={empty}"], "empty.jsonl is empty"),
        "broken line": ([model, f"data.train={broken}"], "broken.jsonl line 2 is not JSON"),
        "wrong keys": ([model, f"data.train={mixed}"], "mixed.jsonl line 2 has no 'completion'"),
        "nothing to learn": ([model, f"data.train={long}"], "raise data.max_length"),
        "no layer": ([train, model, "adapter.target_modules=[q_porj]"], "did you mean 'q_proj'"),
        "missing model": ([train, "model.path=./absent"], "no such folder"),
        "pickle": ([train, f"model.path={pickled}"], "pickle"),
        "remote code": ([train, f"model.path={remote}"], "model.trust_remote_code=true"),
        "truncated": ([train, f"model.path={cut}"], "is cut short"),
        "vocabulary": ([train, f"model.path={small}"], "the model's embedding has 50 rows"),
        "foreign folder": ([train, model, f"output_dir={tmp_path / 'other'}"], "holds files that are not of a run"),
        "no checkpoint": ([train, model, "resume=./absent"], "resume=./absent: no checkpoint there"),
    }


NAMES = [
    "unknown option",
    "wrong type",
    "contradiction",
    "missing data",
    "empty data",
    "broken line",
    "wrong keys",
    "nothing to learn",
    "no layer",
    "missing model",
    "pickle",
    "remote code",
    "truncated",
    "vocabulary",
    "foreign folder",
    "no checkpoint",
]
ON_TWO_RANKS = ["unknown option", "broken line", "truncated", "no layer", "foreign folder"]


def _assert_told(arguments: list[str], words: str, nproc: int, tmp_path: Path) -> None:
    run = tmp_path / "run"
    if not any(argument.startswith("output_dir") for argument in arguments):
        arguments = [*arguments, f"output_dir={run}"]
    done = qdora("train", *arguments, "tracker=none", nproc=nproc, timeout_s=60)
    assert done.returncode == 2, done.stdout + done.stderr
    told = [line for line in done.stderr.splitlines() if line.startswith("qdora:")]
    assert len(told) == 1, done.stderr
    assert words in told[0]
    assert "Traceback" not in done.stdout + done.stderr
    assert not run.exists()


@pytest.mark.parametrize("name", NAMES)
def test_mistake_is_told_in_one_line(name: str, mistakes: dict[str, tuple[list[str], str]], tmp_path: Path) -> None:
    assert sorted(NAMES) == sorted(mistakes)
    _assert_told(*mistakes[name], 1, tmp_path)


@pytest.mark.parametrize("name", ON_TWO_RANKS)
def test_mistake_on_two_ranks_is_told_once_and_none_hangs(
    name: str, mistakes: dict[str, tuple[list[str], str]], tmp_path: Path
) -> None:
    _assert_told(*mistakes[name], 2, tmp_path)


def test_foreign_files_are_not_touched(mistakes: dict[str, tuple[list[str], str]], tmp_path: Path) -> None:
    qdora("train", *mistakes["foreign folder"][0], "tracker=none")
    assert [file.name for file in (tmp_path / "other").iterdir()] == ["thesis.txt"]


def test_single_rank_plan_on_two_ranks_is_told(options: list[str]) -> None:
    done = qdora("train", *options, "parallel=none", nproc=2, timeout_s=60)
    assert done.returncode == 2
    assert "parallel=none runs on one rank, but 2 were started" in done.stderr


@pytest.mark.parametrize("command", ["merge", "evaluate"])
def test_single_process_command_on_two_ranks_is_told(command: str, tmp_path: Path) -> None:
    arguments = ["run=r", f"output={tmp_path}/m"] if command == "merge" else ["run=r", "data.eval=d"]
    done = qdora(command, *arguments, nproc=2, timeout_s=60)
    assert done.returncode == 2
    assert f"qdora {command} runs as one process, but 2 ranks were started" in done.stderr


def test_merge_of_an_unfinished_run_is_told(options: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert qdora("train", *options, f"output_dir={run}").returncode == 0
    (run / "adapter").rename(run / "gone")
    done = qdora("merge", f"run={run}", f"output={tmp_path}/merged")
    assert done.returncode == 2
    assert "has no adapter: it is not finished" in done.stderr
    assert not (tmp_path / "merged").exists()

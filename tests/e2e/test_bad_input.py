"""Mistakes as a user makes them: one line on rank 0, exit status 2, no traceback, nothing left hanging."""

import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest

from tests.support.marks import nightly, nightly_but
from tests.support.models import make_model
from tests.support.processes import ROOT, qdora, run

GOOD = {"prompt": "a", "completion": "b"}
Mistakes = dict[str, tuple[list[str], str]]

NOISE = [
    # transformers 5 of a config.json whose model_type it does not know.
    r"\[transformers\] You are using a model of type `mine` to instantiate a model of type ``\. .*",
]
"""Lines of libraries that may stand beside the message."""


def write_rows(file: Path, *lines: object) -> Path:
    """A jsonl file; strings are written as they are."""
    file.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return file


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of what the mistakes need."""
    return tmp_path_factory.mktemp("mistakes")


@pytest.fixture(scope="module")
def mistakes(tiny: Path, data: Path, folder: Path) -> Mistakes:
    """Arguments and the words that must be told, by name."""
    model, train = f"model.path={tiny}", f"data.train={data}"
    pickled = make_model(folder / "pickled", "llama", num_hidden_layers=1)
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    cut = make_model(folder / "cut", "llama", num_hidden_layers=1)
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:-64])
    small = make_model(folder / "small", "llama", num_hidden_layers=1, vocab_size=50)
    remote = make_model(folder / "remote", "llama", num_hidden_layers=1)
    config = json.loads((remote / "config.json").read_text())
    auto_map = {"AutoConfig": "mine.C", "AutoModelForCausalLM": "mine.M"}
    (remote / "config.json").write_text(json.dumps(config | {"model_type": "mine", "auto_map": auto_map}))
    (remote / "mine.py").write_text("raise SystemExit('this must not run')\n")
    (folder / "other").mkdir()
    (folder / "other" / "thesis.txt").write_text("mine")
    broken = write_rows(folder / "broken.jsonl", GOOD, '{"prompt": "a", "compl')
    mixed = write_rows(folder / "mixed.jsonl", GOOD, {"prompt": "a", "answer": "b"})
    empty = write_rows(folder / "empty.jsonl")
    long = write_rows(folder / "long.jsonl", {"prompt": "a" * 2000, "completion": "b"})
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
        "attention": ([train, model, "model.attention=flex_attention"], "has no backward on a CPU: use sdpa"),
        "pickle": ([train, f"model.path={pickled}"], "holds only pickled weights (pytorch_model.bin)"),
        "remote code": ([train, f"model.path={remote}"], "model.trust_remote_code=true"),
        "truncated": ([train, f"model.path={cut}"], "is cut short"),
        "vocabulary": ([train, f"model.path={small}"], "the model's embedding has 50 rows"),
        "foreign folder": ([train, model, f"output_dir={folder / 'other'}"], "holds files that are not of a run"),
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
    "attention",
    "pickle",
    "remote code",
    "truncated",
    "vocabulary",
    "foreign folder",
    "no checkpoint",
]
KINDS = ["unknown option", "broken line", "truncated"]
"""Before the ranks meet, on rank 0's turn, on every rank while loading; the rest in one process is nightly."""


def is_noise(line: str) -> bool:
    """Whether a library said it."""
    return any(re.fullmatch(noise, line) for noise in NOISE)


def _assert_told(stderr: str, words: str) -> None:
    """All of stderr is one message with `words`."""
    told = [line for line in stderr.splitlines() if not is_noise(line)]
    assert len(told) == 1, stderr
    assert told[0].startswith("qdora: "), stderr
    assert words in told[0]


def _run(arguments: list[str], nproc: int, output: Path) -> str:
    """stderr of a run that must end with 2 and leave no folder."""
    if not any(argument.startswith("output_dir") for argument in arguments):
        arguments = [*arguments, f"output_dir={output}"]
    done = qdora("train", *arguments, "tracker=none", nproc=nproc)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stdout
    assert not output.exists()
    return str(done.stderr)


@pytest.mark.parametrize("name", nightly_but(KINDS, NAMES))
def test_mistake_is_told_in_one_line(name: str, mistakes: Mistakes, tmp_path: Path) -> None:
    assert sorted(NAMES) == sorted(mistakes)
    arguments, words = mistakes[name]
    _assert_told(_run(arguments, 1, tmp_path / "run"), words)


@pytest.fixture(scope="module")
def ranks(mistakes: Mistakes, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of what two ranks said of each mistake."""
    output = tmp_path_factory.mktemp("ranks")
    cases = {
        name: ["train", f"output_dir={output}/run-{name}".replace(" ", "-"), "tracker=none", *arguments]
        for name, (arguments, _) in mistakes.items()
    }
    script = Path(__file__).with_name("ranks_mistakes.py")
    done = run([sys.executable, str(script), str(output), json.dumps(cases)], timeout_s=300)
    assert done.returncode == 0, done.stderr
    return output


@pytest.mark.parametrize("name", NAMES)
def test_mistake_on_two_ranks_is_told_once_and_none_hangs(name: str, mistakes: Mistakes, ranks: Path) -> None:
    first, second = json.loads((ranks / f"{name}.json").read_text())
    assert (first["status"], second["status"]) == (2, 2), first["stderr"] + second["stderr"]
    _assert_told(first["stderr"], mistakes[name][1])
    assert not [line for line in second["stderr"].splitlines() if not is_noise(line)]
    assert "Traceback" not in first["stdout"] + second["stdout"]
    assert not list(ranks.glob("run-*"))


@pytest.mark.parametrize("name", ["broken line", *nightly("unknown option", "truncated", "no layer", "foreign folder")])
def test_mistake_under_torchrun_is_told_once(name: str, mistakes: Mistakes, tmp_path: Path) -> None:
    arguments, words = mistakes[name]
    _assert_told(_run(arguments, 2, tmp_path / "run"), words)


def test_mistake_is_told_though_rank_0_is_the_slower_one(tmp_path: Path) -> None:
    """torchrun ends the other ranks as soon as one has failed."""
    late = "import os, time\nif os.environ.get('RANK') == '0':\n    time.sleep(2)\n"
    (tmp_path / "sitecustomize.py").write_text(late)
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = qdora("train", "adapter.rnak=3", nproc=2, PYTHONPATH=path)
    assert done.returncode == 2, done.stderr
    _assert_told(done.stderr, "there is no option adapter.rnak")


def test_mistake_that_only_rank_1_sees_is_told(options: list[str], tiny: Path, tmp_path: Path) -> None:
    """Rank 1 looks for the model from another folder, where the file has been cut."""
    for rank in ("0", "1"):
        shutil.copytree(tiny, tmp_path / rank / "model")
    weights = tmp_path / "1" / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    (tmp_path / "sitecustomize.py").write_text(
        f"import os\nif 'RANK' in os.environ:\n    os.chdir(os.path.join({str(tmp_path)!r}, os.environ['RANK']))\n"
    )
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    arguments = [*options, "model.path=model", f"output_dir={tmp_path}/run"]
    done = qdora("train", *arguments, nproc=2, PYTHONPATH=path)
    assert done.returncode == 2, done.stderr
    _assert_told(done.stderr, "model.safetensors")


def test_foreign_files_are_not_touched(mistakes: Mistakes, ranks: Path, folder: Path) -> None:
    assert [file.name for file in (folder / "other").iterdir()] == ["thesis.txt"]


def test_single_rank_plan_on_two_ranks_is_told(options: list[str]) -> None:
    done = qdora("train", *options, "parallel=none", nproc=2)
    assert done.returncode == 2
    assert "parallel=none runs on one rank, but 2 were started" in done.stderr


def test_single_process_command_on_two_ranks_is_told(tmp_path: Path) -> None:
    done = qdora("merge", "run=r", f"output={tmp_path}/m", nproc=2)
    assert done.returncode == 2
    assert "qdora merge runs as one process, but 2 ranks were started" in done.stderr


def test_merge_of_an_unfinished_run_is_told(options: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert qdora("train", *options, f"output_dir={run}").returncode == 0
    (run / "adapter").rename(run / "gone")
    (run / "checkpoints").rename(run / "checkpoints-gone")
    done = qdora("merge", f"run={run}", f"output={tmp_path}/merged")
    assert done.returncode == 2
    assert f"run={run} is not finished, and has no checkpoint yet. Wait for its end" in done.stderr
    assert not (tmp_path / "merged").exists()

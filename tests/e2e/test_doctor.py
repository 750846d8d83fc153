"""`qdora doctor` on this machine, and on ones on which a run cannot start."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from qdora.config import ModelConfig
from qdora.doctor import machine, ranks
from qdora.doctor.finding import Finding, Verdict, joined
from qdora.doctor.model import model
from tests.support.faults import fill, small_disk
from tests.support.marks import nightly
from tests.support.models import make_model
from tests.support.processes import launcher, qdora, run

CHECKS = {"Python", "libraries", "torch", "CPU", "GPU", "NF4 kernel", "speed", "disk", "shared memory", "W&B", "hub"}
COLLECTIVES = [
    *("all-gather", "all-gather, uneven"),
    *("reduce-scatter float32", "reduce-scatter bfloat16", "all-reduce", "broadcast"),
]
"""In the order in which they are tried."""


def findings(done: Any) -> dict[str, dict[str, Any]]:
    report = json.loads(done.stdout)
    assert report["can_start"] == (done.returncode == 0)
    found = {finding["check"]: finding for finding in report["findings"]}
    assert len(found) == len(report["findings"]), "one row a check"
    for finding in found.values():
        assert finding["found"]
        assert bool(finding["remedy"]) == (finding["verdict"] in ("warning", "failed")), finding
    return found


@pytest.mark.parametrize("nproc", [2, *nightly(1)])
def test_report_on_this_machine(tiny: Path, tmp_path: Path, nproc: int) -> None:
    done = qdora("doctor", f"model.path={tiny}", f"output_dir={tmp_path}", "report=json", nproc=nproc)
    assert done.returncode == 0, done.stdout + done.stderr
    found = findings(done)
    assert found.keys() == CHECKS | {"model"} | ({"collectives"} if nproc == 1 else {*COLLECTIVES, "link"})
    fine = ["Python", "libraries", "torch", "NF4 kernel", "speed", "model"]
    for name in [*fine, *COLLECTIVES] if nproc == 2 else fine:
        assert found[name]["verdict"] == "ok", found[name]
    assert found["GPU"]["verdict"] == "skipped"
    assert found["NF4 kernel"]["ranks"] == list(range(nproc))
    assert found["model"]["found"].startswith("LlamaForCausalLM, 0.00 GiB of weights, 7 layers in NF4")


def test_table_ends_in_whether_a_run_can_start(tmp_path: Path) -> None:
    done = qdora("doctor", f"output_dir={tmp_path}", "tracker=none")
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip().endswith("a run can start here")
    for check in CHECKS:
        assert f" {check} " in done.stdout


def test_wrong_bytes_of_one_rank_are_found(tmp_path: Path) -> None:
    script = Path(__file__).parent / "ranks_doctor.py"
    done = run([*launcher(2), str(script), "doctor", f"output_dir={tmp_path}", "report=json"])
    assert done.returncode == 1, done.stderr
    report = json.loads(done.stdout)
    wrong = [finding for finding in report["findings"] if finding["verdict"] == "failed"]
    assert [(finding["check"], finding["ranks"]) for finding in wrong] == [(name, [1]) for name in COLLECTIVES]
    for finding in wrong:
        assert finding["found"] == "rank 1 got what was not sent, first at 12345, with 65539 elements a rank"
        assert "NCCL_P2P_DISABLE=1" in finding["remedy"]


def damaged(tiny: Path, folder: Path, kind: str) -> str:
    shutil.copytree(tiny, folder)
    weights = folder / "model.safetensors"
    if kind == "cut":
        weights.write_bytes(weights.read_bytes()[:-100])
        return "is cut short"
    if kind == "no weights":
        weights.unlink()
        return "no *.safetensors in"
    if kind == "a shard is missing":
        (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-2.safetensors"}}')
        return "is missing, though the index names it"
    if kind == "unknown":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"model_type": "nobody_knows"}))
        return "cannot read the config"
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    return "tokenizer"


@pytest.mark.parametrize("kind", ["cut", *nightly("no weights", "a shard is missing", "unknown", "no tokenizer")])
def test_model_that_cannot_be_trained_is_told(tiny: Path, tmp_path: Path, kind: str) -> None:
    words = damaged(tiny, tmp_path / "model", kind)
    done = qdora("doctor", f"model.path={tmp_path}/model", f"output_dir={tmp_path}", "report=json")
    assert done.returncode == 1, done.stdout
    finding = findings(done)["model"]
    assert finding["verdict"] == "failed"
    assert words in finding["found"]


@pytest.mark.parametrize("kind", ["no tokenizer", "vocabulary"])
def test_tokenizer_that_is_missing_or_of_another_model_is_told(tiny: Path, tmp_path: Path, kind: str) -> None:
    """As a run refuses it."""
    folder = tmp_path / "model"
    if kind == "vocabulary":
        make_model(folder, "llama", vocab_size=100)
        words = "the model's embedding has 100 rows"
    else:
        words = damaged(tiny, folder, kind)
    assert model(ModelConfig(path=str(tiny))).verdict is Verdict.ok
    finding = model(ModelConfig(path=str(folder)))
    assert finding.verdict is Verdict.failed
    assert words in finding.found


@pytest.mark.nightly
def test_model_that_is_neither_here_nor_to_be_had(tmp_path: Path) -> None:
    done = qdora("doctor", "model.path=someone/model", f"output_dir={tmp_path}", "report=json")
    assert done.returncode == 1
    assert "someone/model is not in the local cache" in findings(done)["model"]["found"]


def test_libraries_that_are_missing_or_too_old_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By an installed qdora that asks for more than is here."""
    about = tmp_path / "qdora-0.0.dist-info"
    about.mkdir()
    wanted = ["torch>=99", "packaging>=1", "no-such-library>=1", 'pytest>=999; extra == "dev"']
    lines = ["Metadata-Version: 2.1", "Name: qdora", "Version: 0.0", "Requires-Python: >=3"]
    (about / "METADATA").write_text("\n".join([*lines, *[f"Requires-Dist: {line}" for line in wanted], ""]))
    libraries = {finding.check: finding for finding in machine.software()}["libraries"]
    assert libraries.verdict is Verdict.ok
    monkeypatch.syspath_prepend(tmp_path)
    libraries = {finding.check: finding for finding in machine.software()}["libraries"]
    assert libraries.verdict is Verdict.failed
    assert libraries.found == f"torch {torch.__version__} (needs >=99), no-such-library is missing (needs >=1)"


def test_full_disk_and_small_shared_memory(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "2m"):
        assert machine.disk(tmp_path / "disk" / "run").verdict is Verdict.failed
        assert machine.shared_memory(tmp_path / "disk").verdict is Verdict.warning
        fill(tmp_path / "disk")
        assert "cannot be written: [Errno 28]" in machine.disk(tmp_path / "disk").found
    assert machine.shared_memory(tmp_path / "nowhere").verdict is Verdict.skipped


def test_kernel_is_held_to_values_worked_out_here(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cpu")
    assert machine.kernels(device, torch.bfloat16).verdict is Verdict.ok
    assert machine.kernels(device, torch.float32).verdict is Verdict.ok
    monkeypatch.setattr(machine, "NF4_VALUES", (*machine.NF4_VALUES[:-2], 0.74, 1.0))
    assert machine.kernels(device, torch.bfloat16).verdict is Verdict.failed


def test_difference_is_where_it_is() -> None:
    sent = ranks.pattern(1, 1000, 0, torch.device("cpu"))
    assert ranks.first_difference(sent.clone(), sent) is None
    other = sent.clone()
    other[77] ^= 1
    assert ranks.first_difference(other, sent) == 77
    assert not torch.equal(sent, ranks.pattern(0, 1000, 0, torch.device("cpu")))
    assert not torch.equal(sent, ranks.pattern(1, 1000, 1, torch.device("cpu")))


def test_what_ranks_share_is_one_row() -> None:
    fine, wrong = Finding("a", Verdict.ok, "right"), Finding("a", Verdict.failed, "wrong", "mend it")
    other = Finding("b", Verdict.ok, "right")
    rows = joined([[fine, other], [wrong, other], [fine, other]])
    assert [(row.finding, row.ranks) for row in rows] == [(fine, [0, 2]), (wrong, [1]), (other, [0, 1, 2])]

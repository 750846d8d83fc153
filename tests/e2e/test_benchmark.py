"""The benchmark on a toy model: every arm runs, all agree in loss, and everything is written down."""

import json
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.support.marks import nightly
from tests.support.models import make_model
from tests.support.processes import run

ARMS = {"peft-qlora", "peft-qdora", "qlora", "qdora", "qdora-compiled"}


@pytest.mark.nightly(paths=["benchmarks/*.py", "qdora/training/trainer.py"])
@pytest.mark.parametrize("ranks", [1, *nightly(2)])
def test_arms_take_the_same_steps(tmp_path: Path, root: Path, ranks: int) -> None:
    model, output = make_model(tmp_path / "model", "llama", num_hidden_layers=1), tmp_path / "steps.json"
    arms = ARMS | ({"peft-lora", "dora"} if ranks == 1 else set())
    options = ["--tokens=64", "--length=32", "--accumulation=2", "--steps=2", f"--model={model}", f"--output={output}"]
    options += ["--profile"] if ranks == 1 else []
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    done = run([sys.executable, *launcher, str(root / "benchmarks" / "step.py"), *options, "--arms", *sorted(arms)])
    assert done.returncode == 0, done.stderr[-3000:]
    record = json.loads(output.read_text())
    assert record["results"].keys() == arms
    assert record["bounds"].keys() == {name for name in arms if not name.startswith("peft")}
    assert record["ranks"] == ranks
    for result in record["results"].values():
        assert len(result["seconds"]) == 2
        assert len(result["losses"]) == 4
        if ranks == 1:
            assert result["profile"]["operators"] > 100
            assert result["profile"]["on_gpu"] == 0
        assert result["losses"][-1] == pytest.approx(record["results"]["peft-qlora"]["losses"][-1], rel=0.01)


def test_a_layer_launches_no_more_than_it_did(tmp_path: Path, root: Path) -> None:
    """The script compares with its own `MOST`; PEFT's QDoRA is there to show that it counts."""
    output = tmp_path / "launches.json"
    done = run([sys.executable, str(root / "benchmarks" / "launches.py"), f"--output={output}"])
    assert done.returncode == 0, done.stderr[-3000:]
    arms = json.loads(output.read_text())["arms"]
    for name, phases in (("qlora", 2), ("qdora", 3)):  # a refresh dequantises, too
        operators = arms[name]["operators of all layers"]
        assert sum(counts.get("dequantize_nf4", 0) for counts in operators.values()) == 16 * phases
        assert operators["forward"]["addmm_"] == operators["backward"]["addmm_"] == 16
    assert arms["qdora"]["a layer"] < arms["peft-qdora"]["a layer"]


def test_a_step_waits_for_its_gpu_nowhere(tmp_path: Path, root: Path) -> None:
    """Beside the trainer's own reading. With a mask transformers looks at each micro-batch: so it would be seen."""
    folder, found = make_model(tmp_path / "model", "llama", num_hidden_layers=2), {}
    for attention, plan in (("varlen", "none"), ("varlen", "fsdp"), ("sdpa", "none")):
        options = [str(folder), f"model.attention={attention}", f"parallel={plan}"]
        done = run([sys.executable, str(root / "benchmarks" / "waits.py"), *options])
        assert done.returncode == 0, done.stderr[-3000:]
        found[attention, plan] = json.loads(done.stdout)
    assert found["varlen", "none"] == found["varlen", "fsdp"] == {"gradients": [], "update": []}
    assert found["sdpa", "none"] == {"gradients": ["_local_scalar_dense in _token_loss"] * 2, "update": []}


@pytest.mark.nightly
def test_overhead_is_measured_against_peft(tmp_path: Path, root: Path) -> None:
    output = tmp_path / "overhead.json"
    options = ["--steps=2", "--warmup=1", f"--output={output}"]
    done = run([sys.executable, str(root / "benchmarks" / "overhead.py"), *options])
    arms = json.loads(output.read_text())["arms"]
    assert arms.keys() == ARMS
    assert all(figures["ms"] > 0 for figures in arms.values())
    assert arms["peft-qlora"]["of_peft_qlora"] == 1
    assert (done.returncode == 0) == ("more of PEFT" not in done.stderr)


@pytest.mark.nightly
def test_phases_of_a_thin_step_are_measured(tmp_path: Path, root: Path) -> None:
    """What a refresh of DoRA costs is in its own phase, and LoRA has hardly any."""
    output = tmp_path / "phases.json"
    done = run([sys.executable, str(root / "benchmarks" / "phases.py"), "--steps=5", f"--output={output}"])
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(output.read_text())["us_a_layer"]
    assert found["without adapters"].keys() == {"forward", "backward"}
    assert found["qlora"].keys() == found["qdora"].keys() == {"forward", "backward", "clipping", "AdamW", "refresh"}
    assert found["qdora"]["refresh"] > found["qlora"]["refresh"]


@pytest.mark.nightly(paths=["benchmarks/session.py", "benchmarks/gpu.sh"])
@pytest.mark.timeout(1800)
def test_session_of_a_gpu_runs_on_a_toy_model(tmp_path: Path, root: Path) -> None:
    """Also with a part that fails, and without the time for one."""
    session = ["bash", str(root / "benchmarks" / "gpu.sh"), str(tmp_path / "out"), "--tiny"]
    done = run(session, timeout_s=1500, PYTHON=sys.executable)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    record = json.loads((tmp_path / "out" / "session.json").read_text())
    assert record["gpu"] is None
    parts = record["parts"]
    assert len(parts) == 9
    optional = {"steps of 1B, qdora-liger": "liger_kernel", "steps of 1B, peft-qdora-axolotl": "axolotl"}
    for name, package in optional.items():
        assert find_spec(package) is None, "this test is of its absence"
        assert parts.pop(name) == {"status": f"left out: {package} is not installed"}
    assert all(part["status"] == "passed" for part in parts.values())
    assert parts["ranks"]["num_passed"] == 3
    assert len(parts["tests"]["skipped"]) > 20
    for name in ("steps of 1B", "steps of 8B", "compiled steps of 1B"):
        results = parts[name]["results"]["results"]
        assert all(result["seconds"] and result["profile"]["operators"] > 100 for result in results.values())
        shares = parts[name]["results"]["bound_share"]
        assert shares.keys() == {arm for arm in results if not arm.startswith("peft")}
        assert all(0 < share < 2 for share in shares.values())
    assert "qdora-graph" in parts["steps of 1B"]["results"]["results"]
    assert parts["8B under 24 GiB"]["results"][0]["step_s"] > 0

    done = run([*session, "--seconds=11", "--only", "ranks", "tests"], PYTHON=sys.executable)
    assert done.returncode == 1
    parts = json.loads((tmp_path / "out" / "session.json").read_text())["parts"]
    assert parts["ranks"]["status"] == "not ended after 11 s"
    assert parts["tests"] == {"status": "no time left"}


@pytest.mark.nightly
@pytest.mark.timeout(1800)
def test_every_case_of_a_gpu_runs_on_a_toy_model(tmp_path: Path, root: Path) -> None:
    output = tmp_path / "results" / "tiny"
    options = ["--tiny", "--repeats=1", "--steps=1", f"--output={output}"]
    done = run([sys.executable, str(root / "benchmarks" / "run.py"), *options], cwd=tmp_path, timeout_s=900)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "there are no GPU figures" in done.stdout
    record = json.loads(output.with_suffix(".json").read_text())
    assert record["gpu"] is None
    assert record["versions"]["torch"]
    cases = record["cases"]
    keys = ("tokens", "rank", "recomputation", "accumulation", "arms")
    varied = {tuple(map(str, (case[key] for key in keys))) for case in cases}
    assert len(varied) == len(cases) == 8
    assert set(cases[0]["results"]) == ARMS
    for case in cases:
        assert set(case["results"]) == set(case["arms"])
        for name, result in case["results"].items():
            assert result["median_s"] > 0
            assert result["peak_bytes"] > 0
            assert (result["bound_s"] is None) == name.startswith("peft")
    assert output.with_suffix(".png").stat().st_size > 10_000

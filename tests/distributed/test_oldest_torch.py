"""Sharding with the oldest torch that pyproject.toml allows, over this environment's other libraries."""

import subprocess
import sysconfig
import tomllib
import venv
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.support.processes import run

TESTS = [
    "tests/unit/test_sharding.py",
    "tests/gpu/test_ranks.py",
    "tests/distributed/test_gradients.py",
    "-k=test_sharding or test_ranks or ((division or hsdp or receives) and (offload or no-reshard or full-full or "
    "qdora-hsdp or qdora-selective or untied_ends-part-full or qdora-bfloat16))",
]
INSTALL_S, TEST_S = 900, 900


def oldest_torch(root: Path) -> str:
    """Returns the version that the requirement on torch begins with."""
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    (requirement,) = (one for one in map(Requirement, project["dependencies"]) if one.name == "torch")
    (bound,) = requirement.specifier
    assert bound.operator == ">="
    return f"{bound.version}.0"


@pytest.mark.nightly(paths=["qdora/sharding.py", "pyproject.toml"])
@pytest.mark.timeout(INSTALL_S + TEST_S)
def test_sharded_runs_are_right_with_the_oldest_torch(root: Path, tmp_path: Path) -> None:
    """Some 4 GB are installed: the index has this version with CUDA."""
    version = oldest_torch(root)
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    command = [str(python), "-m", "pip", "install", "--quiet", "--no-compile", f"torch=={version}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_S, check=False)
    if done.returncode:
        pytest.skip(f"torch {version} cannot be installed: {done.stderr.strip().splitlines()[-1]}")
    site = sysconfig.get_path("purelib", vars={"base": str(tmp_path / "venv")})
    (Path(site) / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    told = run([str(python), "-c", "import torch; print(torch.__version__)"], cold=True)
    assert told.stdout.startswith(version), told.stderr
    ran = run([str(python), "-m", "pytest", "-q", "-n0", "--tier=all", *TESTS], cold=True, timeout_s=TEST_S)
    assert ran.returncode == 0, ran.stdout[-5000:]
    assert "skipped" not in ran.stdout.splitlines()[-1]

"""Fixtures of every test: the real model, and the path of the repository."""

import os
import sys
from pathlib import Path

import pytest

if not ("PYTEST_XDIST_WORKER" in os.environ or any("gpu" in argument for argument in sys.argv)):
    # Before torch looks: the CPU tests are the same on a machine with GPUs; launch/test.sh runs tests/gpu by itself.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
# Before the libraries look, here and in what is started: one thread a rank, so that runs in this process are bit for
# bit those of others; ranks share few cores, so threads that wait must not spin.
os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"}
os.environ |= {"WANDB_MODE": "offline", "HF_HUB_OFFLINE": "1"}

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct as a transformers folder; launch/setup.sh makes it."""
    folder = ROOT / "models" / "SmolLM2-135M-Instruct"
    assert (folder / "config.json").exists(), f"{folder} is missing: run launch/test.sh, which makes it"
    return folder


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokenised data of tests does not land in, or come from, the user's cache; W&B never goes online."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.setenv("WANDB_MODE", "offline")

"""Fixtures of every test: the real model, and the path of the repository."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import ROOT, processes, warm

if not ("PYTEST_XDIST_WORKER" in os.environ or any("gpu" in Path(argument).parts for argument in sys.argv)):
    # Before torch looks: the CPU tests are the same on a machine with GPUs; launch/test.sh runs tests/gpu by itself.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
# Before the libraries look, here and in what is started: one thread a rank, so that runs in this process are bit for
# bit those of others; ranks share few cores, so threads that wait must not spin.
os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"}
os.environ |= {"OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
os.environ |= {"WANDB_MODE": "offline", "HF_HUB_OFFLINE": "1"}
for _name in [name for name in os.environ if name.startswith("QDORA_") and name.endswith("_S")]:
    del os.environ[_name]  # a developer's own waits

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in the background: what tests start would not hear Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)

pytest_plugins = ["tests.support.tiers"]


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


@pytest.fixture(scope="session", autouse=True)
def _products() -> None:
    """Those of a command, for what tests call in this process."""
    from qdora import cpu_products

    cpu_products.install()


@pytest.fixture(scope="session", autouse=True)
def _warm_processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Lets helpers fork processes that have everything imported; the first one that is asked for starts the server."""
    cache = str(tmp_path_factory.getbasetemp() / "cache")
    warm.Server.environment = {**os.environ, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": cache, "WANDB_MODE": "offline"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess, "Popen", warm.PopenOfMerge)  # for merges in this process
        yield
    warm.Server.stop()


@pytest.fixture(autouse=True)
def _no_process_is_left() -> Iterator[None]:
    """Ends what a test has started by `processes.start` and, as it failed, has not waited for."""
    yield
    while processes.started:
        process = processes.started.pop()
        if process.poll() is None:
            processes.end(process)


@pytest.fixture(autouse=True)
def _own_environment(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tokenised data of tests does not land in, or come from, the user's cache; W&B never goes online.

    What a test, or a library that it imports, writes into the environment is gone after it.
    """
    before = dict(os.environ)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    yield
    monkeypatch.undo()
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update({name: value for name, value in before.items() if os.environ.get(name) != value})

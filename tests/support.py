"""What several tests need: tiny random models of real families, and ranks started as a user starts them."""

import io
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from qdora import commands

ROOT = Path(__file__).resolve().parent.parent

_COMMON: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "tie_word_embeddings": False},
    "llama-tied": {"model_type": "llama", "tie_word_embeddings": True},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": False},  # bias in q, k and v
    "qwen3": {"model_type": "qwen3", "head_dim": 32, "tie_word_embeddings": True},
    "mistral": {"model_type": "mistral", "head_dim": 32, "sliding_window": 64},
    "gemma3": {"model_type": "gemma3_text", "head_dim": 32, "sliding_window": 64, "query_pre_attn_scalar": 32},
    "phi3": {"model_type": "phi3", "tie_word_embeddings": False},
}
"""A tiny configuration of each kind of decoder; all with grouped-query attention."""


def make_model(
    folder: Path, family: str, *, seed: int = 0, dtype: torch.dtype = torch.bfloat16, **changes: Any
) -> Path:
    """Saves a tiny random model of `family` with a byte-like tokenizer to `folder`, which is returned.

    `max_shard_size` among `changes` cuts the checkpoint; the rest overrides the configuration.
    """
    max_shard_size = changes.pop("max_shard_size", "5GB")
    values = {**_COMMON, **FAMILIES[family], **changes}
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # transformers starts them at zero, which would hide a bias that is lost
            torch.nn.init.normal_(parameter, std=0.5)
        elif parameter.ndim == 2:  # larger than transformers' 0.02, so that logits differ
            torch.nn.init.normal_(parameter, std=0.08)
    model.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    make_tokenizer().save_pretrained(folder)
    return folder


def make_tokenizer(chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """One token a character (97 printable ones), `<pad>`, `<s>` and `</s>`; no chat template unless given."""
    characters = [chr(code) for code in range(32, 127)] + ["\n", "\t"]
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<s>", "</s>", "<unk>", *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    fast.chat_template = chat_template
    return fast


def soak(*cases: Any) -> list[Any]:
    """Cases of `parametrize` (several values of one are a tuple) that only `launch/test.sh -m soak` runs."""
    return [pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.soak) for case in cases]


def soak_but(kept: Collection[Any], cases: Iterable[Any]) -> list[Any]:
    """`cases`, of which only those in `kept` are run without `-m soak`."""
    return [case if case in kept else soak(case)[0] for case in cases]


def asked(request: pytest.FixtureRequest, name: str) -> list[Any]:
    """The values of parameter `name` in the tests that are run, for a fixture that computes all of them at once."""
    items = [item for item in request.session.items if item.path == request.path]
    of_tests = [item.callspec.params for item in items if hasattr(item, "callspec")]
    return list(dict.fromkeys(values[name] for values in of_tests if name in values))


def run(arguments: list[str], *, timeout_s: float = 180, cwd: Path = ROOT, **environment: str) -> Any:
    """A finished subprocess with stdout and stderr as text."""
    variables = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(
        arguments, capture_output=True, text=True, timeout=timeout_s, cwd=cwd, env=variables, check=False
    )


def launcher(nproc: int, torchrun: bool = False) -> list[str]:
    """What starts a script, or `-m qdora`: alone, or under torchrun where there are several ranks or it is wanted."""
    given = ["-m", "qdora.commands.launch", "--standalone", "--nproc-per-node", str(nproc)]
    return [sys.executable, *(given if nproc > 1 or torchrun else [])]


def qdora(*arguments: str, nproc: int = 1, own_process: bool = False, **options: Any) -> Any:
    """`qdora ...`: several ranks under torchrun, as a user starts them, with `options` of `run`; one in this process.

    That has everything imported, which costs a new one seconds of a core. What libraries write to file descriptors
    and Python's warnings are not in its stderr. `own_process` is for that, for W&B, whose process would stay, and for
    what makes a process group on one rank (full fine-tuning, `cpu_offload`), which can abort as a process ends.
    """
    if nproc == 1 and not own_process:
        assert not options, "of a process"
        return _here([*arguments])
    return run([*launcher(nproc), "-m", "qdora", *arguments], **options)


def _here(arguments: list[str]) -> "subprocess.CompletedProcess[str]":
    stdout, stderr = io.StringIO(), io.StringIO()
    told = logging.StreamHandler(stderr)  # for logging.lastResort, which is silent beside pytest's handlers
    told.setLevel(logging.WARNING)
    logging.root.addHandler(told)
    try:
        # W&B names its process in the environment, for the processes that this one starts.
        with redirect_stdout(stdout), redirect_stderr(stderr), mock.patch.dict(os.environ):
            status = commands.run(arguments)
    finally:
        logging.root.removeHandler(told)
    return subprocess.CompletedProcess(arguments, status, stdout.getvalue(), stderr.getvalue())


def interrupt_when(is_time: Callable[[], bool], arguments: list[str], number: int) -> int:
    """Starts `qdora ...` in its own process and sends it a signal as soon as it is time; returns the exit status."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [*launcher(1), "-m", "qdora", *arguments]
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 240
        while not is_time():
            assert process.poll() is None, "it ended before"
            assert time.monotonic() < deadline, "the time did not come"
            time.sleep(0.002)
        process.send_signal(number)
    return process.returncode


def run_ranks(script: Path, nproc: int, output: Path, *arguments: str, timeout_s: float = 180) -> list[Any]:
    """Runs `script OUTPUT-FOLDER ARGUMENTS...` on `nproc` ranks; returns what each wrote to OUTPUT/rank-N.json.

    Fails with the ranks' output if one of them fails.
    """
    output.mkdir(parents=True, exist_ok=True)
    done = run([*launcher(nproc, torchrun=True), str(script), str(output), *arguments], timeout_s=timeout_s)
    assert done.returncode == 0, f"ranks ended with {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return [json.loads((output / f"rank-{rank}.json").read_text()) for rank in range(nproc)]


def wandb_records(folder: Path, kind: str) -> list[dict[str, Any]]:
    """The records of a kind in the .wandb files below `folder`, in the order in which the runs started."""
    lines: list[str] = []
    for path in sorted(folder.glob("wandb/*run-*/run-*.wandb")):
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(path)]
        lines += subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout.splitlines()
    return [record[kind] for record in map(json.loads, lines) if record["type"] == kind]


def write_sums(file: Path) -> Path:
    """48 sums, easy to learn the form of, with answers of different lengths; returns `file`."""
    rows = [{"prompt": f"{n}+{n}=", "completion": f"{n + n} " + "so " * (n % 4)} for n in range(48)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def long_run(tiny: Path, data: Path) -> list[str]:
    """30 steps, a checkpoint every 5, with dropout, so that random numbers count too."""
    return [
        f"model.path={tiny}",
        f"data.train={data}",
        "data.max_length=64",
        "adapter.rank=4",
        "adapter.dropout=0.1",
        "optim.learning_rate=1e-2",
        "train.num_steps=30",
        "train.num_accumulation_steps=2",
        "train.checkpoint_every=5",
        "tracker=none",
    ]

"""What the parts of a step cost on this machine, and what was tried in their place: the figures of docs/log.md.

    python benchmarks/parts.py --output benchmarks/results/parts-DATE.json [--pack FILE ...]

`--pack` adds how full the rows of data sets are that are not in the repository.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from arms import Arm, Case, build
from provenance import provenance
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.profiler import ProfilerActivity, profile

from qdora import parallel
from qdora.config import ActivationCheckpointing, DataConfig, ModelConfig
from qdora.data import prepare
from qdora.data.loader import pack
from qdora.model import load_tokenizer
from qdora.parallel import World
from qdora.rates import measure_rates

MODEL = Path("models/SmolLM2-135M-Instruct")
TOKENS, LENGTH, WIDTH, RANK, HEADS, KEY_HEADS, HEAD_DIM = 1024, 256, 576, 16, 9, 3, 64
KEPT_MEMORY = "glibc.malloc.mmap_threshold=1073741824:glibc.malloc.trim_threshold=4294967296"
OUTPUTS = (192, 576, 1536)
"""Of the layers of SmolLM2-135M."""
OPERATORS = {
    "matrix products": ("aten::mm", "aten::addmm_", "aten::addmm"),
    "attention": (
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_flash_attention_for_cpu_backward",
    ),
}


def medians_ms(functions: dict[str, Callable[[], object]], repeats: int = 60) -> dict[str, float]:
    """Milliseconds of a call of each, in turn, after two rounds that do not count."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(2 + repeats):
        for name, function in functions.items():
            started = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - started)
    return {name: 1000 * statistics.median(values[2:]) for name, values in seconds.items()}


def step_parts(world: World, name: str) -> dict[str, float]:
    """Seconds of a step of the arm `name`, of its optimiser with what follows it, and of some operators."""
    case = Case(TOKENS, LENGTH, RANK, ActivationCheckpointing.none, 1)
    arm: Arm = build(name, MODEL, case, world)
    batches = [case.batches(world, index, 40000) for index in range(7)]
    for batch in batches[:2]:
        arm.step(batch)
    seconds = []
    for batch in batches[2:]:
        started = time.perf_counter()
        arm.step(batch)
        seconds.append(time.perf_counter() - started)
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        arm.step(batches[0])
    events = {event.key: event for event in profiled.key_averages()}
    parts = {"step": statistics.median(seconds), "calls": sum(event.count for event in events.values())}
    parts["optimiser and norms"] = events["Optimizer.step#AdamW.step"].cpu_time_total / 1e6
    parts["loss"] = events["_ChunkedCrossEntropy"].cpu_time_total / 1e6
    for part, keys in OPERATORS.items():
        parts[part] = sum(events[key].self_cpu_time_total for key in keys if key in events) / 1e6
    return parts


def magnitude_gradient(out: int) -> dict[str, float]:
    """Milliseconds of sum over tokens of dy * y, (tokens, out) bfloat16 each, in several ways."""
    pairs = [(torch.randn(TOKENS, out).bfloat16(), torch.randn(TOKENS, out).bfloat16()) for _ in range(12)]
    turn = iter(range(10**9))

    def in_chunks(dy: Tensor, y: Tensor) -> Tensor:
        return torch.stack([(a * b).sum(0) for a, b in zip(dy.split(128), y.split(128), strict=True)]).sum(0)

    ways: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "two passes": lambda dy, y: (dy * y).sum(0).float(),
        "chunks of 128 rows": in_chunks,
        "compiled": torch.compile(lambda dy, y: (dy.float() * y.float()).sum(0), dynamic=True),
    }
    return medians_ms({name: lambda way=way: way(*pairs[next(turn) % len(pairs)]) for name, way in ways.items()})


def attention(length: int) -> dict[str, float]:
    """Milliseconds of a layer's attention, forward and backward, of `TOKENS` tokens in rows of `length`."""
    shape = (TOKENS // length, HEADS, length, HEAD_DIM)
    q, upstream = torch.randn(shape).bfloat16().requires_grad_(), torch.randn(shape).bfloat16()
    k, v = (torch.randn(shape[0], KEY_HEADS, *shape[2:]).bfloat16().requires_grad_() for _ in range(2))
    future = torch.ones(length, length, dtype=torch.bool).triu(1)

    def products() -> Tensor:
        keys, values = (part.repeat_interleave(HEADS // KEY_HEADS, 1) for part in (k, v))
        scores = (q * HEAD_DIM**-0.5) @ keys.transpose(-1, -2)
        return scores.masked_fill(future, float("-inf")).softmax(-1) @ values

    def flash() -> Tensor:
        return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    return medians_ms({way.__name__: lambda way=way: way().backward(upstream) for way in (flash, products)}, repeats=20)


def shared_inputs() -> dict[str, float]:
    """Milliseconds of x -> A x, dA and dx of q, k, v: an operator each, and as one that knows of all three."""
    x = torch.randn(TOKENS, WIDTH).bfloat16()
    a = [torch.randn(RANK, WIDTH).bfloat16() for _ in range(3)]
    dxa = [torch.randn(TOKENS, RANK).bfloat16() for _ in range(3)]
    dx = [torch.randn(TOKENS, WIDTH).bfloat16() for _ in range(3)]

    def apart() -> None:
        for one, d, out in zip(a, dxa, dx, strict=True):
            torch.mm(x, one.T)
            torch.mm(d.T, x)
            out.addmm_(d, one)
        dx[0] + dx[1] + dx[2]  # autograd's

    def together() -> None:
        whole, d = torch.cat(a), torch.cat(dxa, 1)
        torch.mm(x, whole.T)
        torch.mm(d.T, x)
        dx[0].add_(dx[1]).add_(dx[2]).addmm_(d, whole)

    return medians_ms({way.__name__: way for way in (apart, together)})


def environments() -> dict[str, dict[str, float]]:
    """Seconds of a step by what the process is started with: threads that wait, and glibc's allocator."""
    kinds = {
        "threads sleep at once": {"OMP_WAIT_POLICY": "PASSIVE"},
        "threads wait a tenth of a millisecond": {"GOMP_SPINCOUNT": "10000"},
        "threads never sleep": {"OMP_WAIT_POLICY": "ACTIVE"},
        "memory is kept": {"GOMP_SPINCOUNT": "10000", "GLIBC_TUNABLES": KEPT_MEMORY},
    }
    plain = {name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    plain["OMP_NUM_THREADS"] = str(os.cpu_count())
    found: dict[str, dict[str, float]] = {}
    for kind, variables in kinds.items():
        with tempfile.NamedTemporaryFile() as output:
            command = [sys.executable, str(Path(__file__).with_name("step.py")), "--model", str(MODEL)]
            command += ["--arms", "peft-qlora", "qlora", "qdora", "--output", output.name]
            subprocess.run(command, env=plain | variables, check=True, capture_output=True)
            results = json.loads(Path(output.name).read_text(encoding="utf-8"))["results"]
        found[kind] = {arm: statistics.median(result["seconds"]) for arm, result in results.items()}
    return found


def packing(files: list[str]) -> dict[str, dict[int, float]]:
    """Share of the rows' length that holds tokens, by file and row length."""
    tokenizer = load_tokenizer(MODEL, ModelConfig(path=str(MODEL)))
    found: dict[str, dict[int, float]] = {}
    for file in files:
        for length in (512, 1024, 2048):
            lengths = prepare(DataConfig(train=file, max_length=length), file, tokenizer).lengths
            rows = pack(lengths, np.arange(len(lengths)), length)
            found.setdefault("/".join(Path(file).parts[-2:]), {})[length] = float(lengths.sum() / (len(rows) * length))
    return found


def main() -> None:
    """Measures everything and writes JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--pack", nargs="*", default=[], metavar="FILE")
    options = parser.parse_args()
    world = parallel.start_alone("benchmarks/parts.py")
    record = provenance() | {
        "matrix_rate": measure_rates(world, torch.bfloat16).matrix,
        "step_s": {name: step_parts(world, name) for name in ("qlora", "qdora")},
        "magnitude_gradient_ms": {out: magnitude_gradient(out) for out in OUTPUTS},
        "shared_inputs_ms": shared_inputs(),
        "environments_s": environments(),
        "attention_ms": {length: attention(length) for length in (256, 1024)},
        "packing": packing(["data/identity_train.jsonl", *options.pack]),
    }
    text = json.dumps(record, indent=2)
    print(text)
    options.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

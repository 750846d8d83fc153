"""Optimiser steps of several arms in turn, in this process (or under torchrun, in every rank's).

    python benchmarks/step.py --model models/SmolLM2-135M-Instruct --tokens 1024 --output steps.json

All arms meet whatever else the machine does alike: what counts is the ratio of medians. A CPU's peak memory needs a
process an arm (`--arms qdora` alone); on a GPU what arms share (the buffer of dequantised weights, cuBLAS' own memory)
counts for the first of them. `benchmarks/run.py` calls this for every case and puts the results together. A
model called `random-SHAPE` is made where it is not there.
"""

import argparse
import contextlib
import gc
import json
import statistics
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from arms import ARMS, ON_GPU, SAME, Arm, Case, build
from random_model import SHAPES, write_random_model
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig
from transformers.utils import logging

from qdora import parallel
from qdora.config import ActivationCheckpointing, ParallelConfig
from qdora.device_memory import memory_gib
from qdora.parallel import World
from qdora.rates import Rates, measure_rates
from qdora.training.memory import FASTEST_FIRST

LOSS_TOLERANCE, NORM_TOLERANCE = 0.002, 0.05
"""Relative, before the first update, of arms that compute the same; they round bfloat16 in different places."""


def measure(arms: dict[str, Arm], case: Case, world: World, vocabulary: int, warmup: int, steps: int) -> dict[str, Any]:
    """Returns each step's seconds and CPU seconds after the warm-up, and every loss, by arm; None: no memory."""
    kinds = ("seconds", "cpu_seconds", "losses", "grad_norms")
    results: dict[str, Any] = {name: {kind: [] for kind in kinds} for name in arms}
    names = list(arms)
    use_gpu = world.device.type == "cuda"
    for index in range(warmup + steps):
        batches = case.batches(world, index, vocabulary)
        first = index % len(names)  # so that no arm always follows the same one
        for name in names[first:] + names[:first]:
            arm = arms[name]
            if results[name] is None:
                continue
            parallel.wait(world)
            before = torch.cuda.memory_allocated()
            if use_gpu:
                torch.cuda.reset_peak_memory_stats()
            started, cpu_started = time.perf_counter(), time.process_time()
            try:
                loss, norm = arm.step(batches)
            except torch.OutOfMemoryError:
                if len(arms) == 1:
                    raise
                results[name] = None
                arm.optimizer.zero_grad(set_to_none=True)
                torch.cuda.empty_cache()
                continue
            parallel.wait(world)
            results[name]["losses"].append(loss)
            results[name]["grad_norms"].append(norm)
            if index >= warmup:
                results[name]["seconds"].append(time.perf_counter() - started)
                results[name]["cpu_seconds"].append(time.process_time() - cpu_started)
            if use_gpu:  # of this arm: what it holds between steps, and what a step adds to all that is there
                if not index:
                    arm.held_bytes += torch.cuda.memory_allocated() - before
                # The highest of all steps: what a graph holds was allocated when it was recorded.
                peak = arm.held_bytes + torch.cuda.max_memory_allocated() - before
                results[name]["peak_bytes"] = max(results[name].get("peak_bytes", 0), peak)
    return results


def profiled_step(arm: Arm, batches: list[Tensor], world: World) -> dict[str, Any]:
    """What one more step has run on the GPU, which calls of CUDA it made, and how many operators, all as counts.

    `kernels` are the 15 that take longest: name, times, seconds.
    """
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if world.device.type == "cuda" else [])]
    with profile(activities=activities) as profiled:
        arm.step(batches)
        parallel.wait(world)
    events = list(profiled.events() or ())
    on_gpu = [event for event in events if event.device_type == DeviceType.CUDA and not event.is_user_annotation]
    times = Counter(event.name for event in on_gpu)
    seconds: Counter[str] = Counter()
    for event in on_gpu:
        seconds[event.name] += event.time_range.elapsed_us() / 1e6  # type: ignore[assignment]
    return {
        "on_gpu": len(on_gpu),
        "gpu_s": sum(seconds.values()),
        "calls": Counter(
            event.name for event in events if event.name.startswith("cu") and event.device_type == DeviceType.CPU
        ),
        "operators": sum(event.name.startswith("aten::") for event in events),
        "kernels": [[name[:100], times[name], taken] for name, taken in seconds.most_common(15)],
    }


def reset_peak(world: World) -> None:
    """Forgets the peak so far: loading is not what is measured."""
    gc.collect()
    if world.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(world.device)
    with contextlib.suppress(OSError):  # where the kernel does not let: the peak then holds the loading too
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def check_same(results: dict[str, Any]) -> None:
    """Asserts that loss and gradient norm of the first step agree where they should."""
    for arms in SAME:
        for key, tolerance in (("losses", LOSS_TOLERANCE), ("grad_norms", NORM_TOLERANCE)):
            first = {name: results[name][key][0] for name in arms if results.get(name)}
            spread = max(first.values(), default=0.0) - min(first.values(), default=0.0)
            assert spread <= tolerance * max(first.values(), default=0.0), f"{key} differ: {first}"


def bounds(arms: dict[str, Arm], case: Case, rates: Rates) -> dict[str, float]:
    """Seconds that a step of each of our arms cannot go below."""
    tokens = case.tokens * case.accumulation
    labels = tokens - tokens // case.length
    return {name: arm.work.bound_s(rates, tokens, labels, case.accumulation) for name, arm in arms.items() if arm.work}


def bound_shares(bounds: dict[str, float], results: dict[str, Any]) -> dict[str, float]:
    """Returns which share of each arm's median step its bound is."""
    measured = {name: bound for name, bound in bounds.items() if results[name] and results[name]["seconds"]}
    return {name: bound / statistics.median(results[name]["seconds"]) for name, bound in measured.items()}


def main() -> None:
    """Measures and writes JSON (rank 0)."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=1024, help="tokens a micro-batch of a rank, in rows of --length")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--recomputation", choices=[kind.name for kind in FASTEST_FIRST], default="none")
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--arms", nargs="+", choices=ON_GPU, default=ARMS)
    parser.add_argument("--profile", action="store_true", help="one more step of each arm, with what it launches")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()

    logging.disable_progress_bar()
    recomputation = ActivationCheckpointing[options.recomputation]
    case = Case(options.tokens, options.length, options.rank, recomputation, options.accumulation)
    world = parallel.start(ParallelConfig())
    shape = options.model.name.removeprefix("random-")
    if shape in SHAPES:
        parallel.main_first(world, lambda: write_random_model(options.model, shape))
    arms = {name: build(name, options.model, case, world) for name in options.arms}
    vocabulary = AutoConfig.from_pretrained(options.model).vocab_size
    rates = measure_rates(world, torch.bfloat16)
    reset_peak(world)
    results = measure(arms, case, world, vocabulary, options.warmup, options.steps)
    least = bounds(arms, case, rates)
    record = {
        "ranks": world.size,
        "device": torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "cpu",
        "results": results,
        "bounds": least,
        "bound_share": bound_shares(least, results),
        "rates": {"matrix": rates.matrix, "copy": rates.copy, "link": rates.link if world.size > 1 else None},
        "peak_bytes": round(max(parallel.gather(world, memory_gib(world))) * 2**30),
    }

    def write() -> None:
        if world.is_main:
            options.output.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")

    write()
    for name in arms if options.profile else ():
        if results[name] is not None:
            batches = case.batches(world, options.warmup + options.steps, vocabulary)
            results[name]["profile"] = profiled_step(arms[name], batches, world)
            write()  # whoever ends this while it profiles has what was measured
    check_same(results)
    parallel.stop()


if __name__ == "__main__":
    main()

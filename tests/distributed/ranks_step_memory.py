"""One rank of test_planning: the most bytes of tensors at a time in a step, by the allocator's own record.

ranks_step_memory.py OUTPUT MODEL LENGTH CASES; a case of the JSON list is [rows, accumulation, [override, ...]].
"""

import gc
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from qdora import nf4, parallel
from qdora.commands import compose, typed
from qdora.config import AdapterMethod, RunConfig
from qdora.model import load_model
from qdora.optim import build_optimizer, clip_gradients
from qdora.training.trainer import accumulate_gradients

MARK = 12_345_677
"""Bytes of a tensor that marks a place in the record; no other has so many."""


def peak_after_mark(record: Any) -> int:
    """Bytes at most after the mark, counted from the record's beginning."""
    now = peak = marks = 0
    for event in record.profiler.kineto_results.events():
        if event.name() == "[memory]":
            size = event.nbytes()
            marks += size == MARK
            now += size
            if marks and abs(size) != MARK:
                peak = max(peak, now)
    assert marks == 1
    return peak


def measure(folder: str, length: int, rows: int, accumulation: int, overrides: list[str]) -> int:
    """The peak of the second and third step."""
    values = compose("train", [f"model.path={folder}", "data.train=none", *overrides])
    assert values is not None
    config: RunConfig = typed(values, RunConfig)
    world = parallel.start(config.parallel, trains_base=config.adapter.method is AdapterMethod.none)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        loaded = load_model(Path(folder), config.model, config.quant, config.adapter, config.parallel, world)
        loaded.recompute(config.parallel.activation_checkpointing)
        optimizer = build_optimizer(loaded.model, config.optim)
        optimizer.register_step_post_hook(lambda *_: loaded.refresh(world.device))
        loaded.model.train()
        vocabulary = loaded.model.config.get_text_config().vocab_size
        generator = torch.Generator().manual_seed(0)
        for step in range(3):
            if step == 1:  # AdamW's moments are there from the second on
                torch.empty(MARK, dtype=torch.uint8)
            tokens = torch.randint(vocabulary, (accumulation, rows, length), generator=generator)
            positions = torch.arange(length // 2).repeat(rows, 2)  # two samples a row
            batches: Any = [
                SimpleNamespace(
                    input_ids=some,
                    position_ids=positions,
                    labels=some,
                    num_label_tokens=some.numel(),
                    num_tokens=some.numel(),
                )
                for some in tokens
            ]
            keep = not config.parallel.reshard_after_forward
            full = config.adapter.method is AdapterMethod.none
            accumulate_gradients(loaded.model, batches, world, reduce_each=full, keep_gathered=keep)
            clip_gradients(loaded.model, config.optim.max_grad_norm, world.shard_group)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return peak_after_mark(record)


def main() -> None:
    """Measures every case."""
    output, folder, length = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    peaks = []
    for rows, accumulation, overrides in json.loads(sys.argv[4]):
        nf4.scratch = nf4.scratch.__class__()  # its buffer belongs to the case
        gc.collect()
        peaks.append(measure(folder, length, rows, accumulation, overrides))
    (output / f"rank-{os.environ.get('RANK', 0)}.json").write_text(json.dumps(peaks))
    os._exit(0)  # see docs/design/0004


if __name__ == "__main__":
    main()

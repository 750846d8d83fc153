"""Jobs over ranks: samples of like length make a batch, ranks take batches in turn, what is scored is kept.

Which samples share a batch depends on the samples and `batch_size` alone, so that a score is the same on one rank or
many, and after an interruption. Each rank has a whole copy of the model, or all share one.

    output_dir/.scored-IDENTITY/rank-0.jsonl    a line for each finished batch; gone when results.json is there
"""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

from qdora import parallel
from qdora.evaluation.scoring import Job, Record, chunks
from qdora.model import LoadedModel
from qdora.parallel import World

LINE_INTERVAL_S = 20.0


def batches_of(job: Job, batch_size: int) -> list[list[int]]:
    """The numbers of the samples in each batch; the longest come first, so that too little memory shows at once."""
    order = sorted(range(len(job.lengths)), key=lambda number: -job.lengths[number])
    return [list(batch) for batch in chunks(order, batch_size)]


def score_all(
    loaded: LoadedModel, jobs: dict[str, Job], batch_size: int, world: World, kept: Path
) -> dict[str, list[Record]]:
    """The records of every sample of every job, in their order, on every rank. *Collective*.

    Args:
        kept: folder of what was scored already, by the same model and of the same samples; goes on from there.
    """
    work = [(name, batch) for name, job in jobs.items() for batch in batches_of(job, batch_size)]
    # Before one writes, and as all see it: file systems may show a rank less than another.
    done: dict[int, list[Record]] = {}
    for some in parallel.gather(world, _read(kept), world.patient_group):
        done |= {number: found for number, found in some.items() if 0 <= number < len(work)}
    done = {number: found for number, found in done.items() if len(found) == len(work[number][1])}
    open_work = [number for number in range(len(work)) if number not in done]
    own: dict[int, list[Record]] = {}
    with (kept / f"rank-{world.rank}.jsonl").open("a", encoding="utf-8") as file, in_step(loaded.model, world):
        file.write("\n")  # ends a line that was left torn
        for number in _shown(open_work[world.rank :: world.size], batch_size, world):
            name, batch = work[number]
            own[number] = jobs[name].score(loaded, batch)
            file.write(json.dumps({"batch": number, "records": own[number]}) + "\n")
            file.flush()
    for some in parallel.gather(world, own, world.patient_group):
        done |= some
    records: dict[str, dict[int, Record]] = {name: {} for name in jobs}
    for number, (name, batch) in enumerate(work):
        records[name] |= dict(zip(batch, done[number], strict=True))
    return {name: [some[number] for number in range(len(some))] for name, some in records.items()}


@contextmanager
def in_step(model: Any, world: World) -> Iterator[None]:
    """Inside, ranks that share one copy of `model` do as many forwards as each has. *Collective* where they share it.

    A forward gathers weights from every rank. So each is announced, and a rank that is through goes along, with one
    token, until all are. Announced are `model(...)`, `generate` and `log_likelihoods`; nothing else inside may gather
    or free weights, as some stay gathered from one forward to the next. A rank that fails leaves the others waiting
    until the launcher ends them.
    """
    if world.mesh is None:
        yield
        return

    def announce(*_: object) -> None:
        parallel.any_of(world, True)

    def announced(*arguments: Any) -> Any:
        announce()
        return log_likelihoods(*arguments)

    # Before FSDP2's own hooks, which gather.
    hook = model.register_forward_pre_hook(announce, prepend=True)
    log_likelihoods, model.log_likelihoods = model.log_likelihoods, announced
    # transformers' own way, with which every rank must generate the same number of batches.
    model.generate = partial(model.generate, synced_gpus=False)
    try:
        yield
    finally:
        hook.remove()
        model.log_likelihoods = log_likelihoods
        del model.generate
    token = torch.zeros(1, 1, dtype=torch.long, device=world.device)
    with torch.no_grad():
        while parallel.any_of(world, False):
            model(input_ids=token, use_cache=False)


def _read(kept: Path) -> dict[int, list[Record]]:
    """What all ranks of starts before have scored; a line that was left torn is passed over."""
    done: dict[int, list[Record]] = {}
    for file in sorted(kept.glob("rank-*.jsonl")):
        for line in lines_of(file):
            match line:
                case {"batch": int(number), "records": [*records]} if all(isinstance(one, dict) for one in records):
                    done[number] = records
    return done


def lines_of(file: Path) -> Iterator[dict[str, Any]]:
    """The objects in a file of JSON lines; what a start left torn, or is none, is passed over."""
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        with suppress(ValueError, RecursionError):
            values = json.loads(line)
            if isinstance(values, dict):
                yield values


def _shown(own: list[int], batch_size: int, world: World) -> Iterator[int]:
    """Hands on what is to be done, and shows on rank 0 how far it is: a bar, or lines where there is no terminal."""
    if not world.is_main:
        yield from own
        return
    console = Console(highlight=False)
    if console.is_terminal:
        yield from track(own, "scoring", console=console)
        return
    began = told = time.monotonic()
    for index, number in enumerate(own):
        if index and time.monotonic() - told > LINE_INTERVAL_S:
            told = time.monotonic()
            left = (told - began) / index * (len(own) - index)
            print(f"scored {index * batch_size * world.size:,} samples, {left:,.0f} s left", flush=True)
        yield number

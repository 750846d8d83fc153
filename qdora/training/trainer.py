"""The training loop: one optimiser step is `Trainer.train_step`."""

import logging
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qdora.adapter.dora import magnitude_drift
from qdora.checkpoint import Checkpoints
from qdora.checkpoint_folder import Change, Manifest
from qdora.config import OnBadStep, RunConfig
from qdora.data import Batch, BatchLoader
from qdora.device_memory import memory_gib
from qdora.errors import TrainingError
from qdora.interrupt import interrupt
from qdora.model import LoadedModel
from qdora.model.loss import Rows, backward, batch_loss, mean_loss
from qdora.optim import build_optimizer, clip_gradients, learning_rate, set_learning_rate, state_tensors
from qdora.parallel import World, all_sum, arm_watchdog, disarm_watchdog, gather, summed
from qdora.planning.length import steps_of
from qdora.rates import Rates
from qdora.run_folder import RunFolder
from qdora.sharding import average_gradients, reshard, set_gradient_sync
from qdora.tracking import Tracker
from qdora.training.bad_step import MAX_SKIPPED, StepGuard
from qdora.training.bound import work_of
from qdora.training.graph import GraphedGradients
from qdora.training.progress import Progress

logger = logging.getLogger(__name__)
DRIFT_EVERY = 10
"""Logged steps between two records of how far the magnitudes have moved."""
CHANGED = "changed"
"""Key of a record of metrics.jsonl: what was changed when the run was resumed before that step."""


@dataclass(slots=True)
class StepMetrics:
    """One optimiser step, over all ranks."""

    loss: float
    grad_norm: float
    num_tokens: int
    seconds: float
    mfu: float
    """Share of the time that the machine's own bound allows (`qdora.training.bound`)."""
    skipped: bool
    """The weights stayed as they were."""
    interrupts: int
    """Ranks that were asked to stop."""
    written: int
    """Ranks whose share of the checkpoint under way is on disk."""
    data_wait: float = 0.0
    """Share of the time that went into waiting for the batches."""


class Trainer:
    """Runs the steps of one run from where `step` stands, and evaluates, logs and saves where that is due."""

    def __init__(
        self,
        config: RunConfig,
        world: World,
        loaded: LoadedModel,
        train_loader: BatchLoader,
        eval_loader: Callable[[], BatchLoader] | None,
        folder: RunFolder,
        rates: Rates,
    ) -> None:
        self.config, self.world, self.loaded, self.model = config, world, loaded, loaded.model
        self.train_loader, self.eval_loader = train_loader, eval_loader
        self.folder, self.rates = folder, rates
        self.tracker = Tracker()
        """Records nothing until the run has been accepted and another takes its place."""
        self.optimizer = build_optimizer(self.model, config.optim)
        # DoRA's row norms, and the rounded factors, follow the weights here and nowhere else in training.
        self.optimizer.register_step_post_hook(self._refresh)
        self._cancelled: Tensor | None = None
        """Whether rows of the rank cancelled at the last update, on the device."""
        self.num_steps = steps_of(config.train, train_loader.num_rows, world.size)
        self.checkpoints = Checkpoints(folder.checkpoints, world, config.train.keep_checkpoints)
        self.guard = StepGuard(config.train.on_bad_step, config.train.spike_deviations)
        self.step = 0
        self.num_tokens = 0
        self.eval_loss: float | None = None
        """Of this step, if it was evaluated."""
        self.changes: list[Change] = []
        """What the steps so far had otherwise than `config`."""
        self.new_changes: list[Change] = []
        """Those that no record has yet."""
        self.step_seconds: list[tuple[int, float]] = []
        self.work = work_of(loaded, world, config.parallel)
        self.add_gradients: AddGradients = partial(add_gradients, self.model, world)
        if config.train.cuda_graph:
            shape = config.train.micro_batch_size, config.data.max_length
            self.add_gradients = GraphedGradients(self.model, world, *shape)

    def run(self, manifest: Callable[["Trainer"], Manifest]) -> str:
        """Trains to `num_steps`, or until an interrupt; returns the run's status. *Collective*.

        `finished`, `preempted`, or `completed_without_last_checkpoint` where the disk did not take it.

        Raises:
            TrainingError: a step was bad and `train.on_bad_step` stops there.
        """
        train = self.config.train
        steps = iter(self.train_loader)
        self.model.train()
        with Progress(self.num_steps, enabled=self.world.is_main, first_step=self.step) as progress:
            if self.step == 0:
                self._log(progress, None, self.evaluate())
            (interrupts,) = all_sum(self.world, interrupt.received)
            stop = interrupts > 0
            while self.step < self.num_steps and not stop:
                started = time.perf_counter()
                batches = next(steps)
                waited = time.perf_counter() - started
                metrics = self.train_step(batches)
                metrics.data_wait = waited / (waited + metrics.seconds)
                self.step += 1
                last, stop = self.step == self.num_steps, metrics.interrupts > 0
                if self.checkpoints.under_way and metrics.written == self.world.size:
                    self.checkpoints.wait()
                due = train.eval_every and self.step % train.eval_every == 0
                self.eval_loss = self.evaluate() if last or (due and not stop) else None
                if last or stop or self.eval_loss is not None or self.step % train.log_every == 0:
                    self._log(progress, metrics, self.eval_loss)
                if last or stop or self._checkpoint_is_due():
                    disarm_watchdog()  # a slow disk, at the end a large export
                    self.checkpoints.save_async(state_tensors(self.model, self.optimizer), manifest(self))
            self.checkpoints.wait()
        if self.step < self.num_steps:
            return "preempted"
        return "finished" if self.checkpoints.failure is None else "completed_without_last_checkpoint"

    def _checkpoint_is_due(self) -> bool:
        every, retry_at = self.config.train.checkpoint_every, self.checkpoints.retry_at
        return bool(every and self.step % every == 0) or (retry_at is not None and self.step >= retry_at)

    def train_step(self, batches: list[Batch]) -> StepMetrics:
        """One optimiser update from this rank's micro-batches. *Collective*.

        All is launched before a GPU is waited for: the update, which leaves everything as it is where loss or norm is
        not finite, and DoRA's refresh. Then the host reads what it wants to know, at once. It does so before the update
        where spikes are looked for.
        """
        started = time.perf_counter()
        own_loss, counts = accumulate_gradients(
            self.model,
            batches,
            self.world,
            reduce_each=self.work.reduces_each,
            keep_gathered=self.work.gathers_once,
            add=self.add_gradients,
        )
        asked = interrupt.received, self.checkpoints.written
        numbers = clip_gradients(self.model, self.config.optim.max_grad_norm, self.world, own_loss, *asked)
        set_learning_rate(self.optimizer, learning_rate(self.config.optim, self.step, self.num_steps))
        is_bad = (numbers[0] + numbers[-1]).isfinite().logical_not()
        fault = None
        if self.guard.looks_for_spikes:
            fault = self.guard.check(*numbers[[0, -1]].tolist())
            is_bad.fill_(fault is not None)
        # Read by AdamW, which changes nothing where it is 1. With shards in host memory that is the CPU, to which torch
        # would copy it without waiting, and read it before it is there.
        found_inf = is_bad.to(self.optimizer.param_groups[0]["params"][0].device, torch.float32)
        self.optimizer.found_inf = found_inf  # type: ignore[attr-defined]
        self.optimizer.step()
        loss, interrupts, written, grad_norm, num_label_tokens, num_tokens = self._read(numbers, counts)
        if not self.guard.looks_for_spikes:
            fault = self.guard.check(loss, grad_norm)
        if fault is not None:
            self._handle_bad_step(fault, batches, gradient_alone=math.isfinite(loss) and not math.isfinite(grad_norm))
        self.optimizer.zero_grad(set_to_none=not self.config.train.cuda_graph)
        self.num_tokens += int(num_tokens)
        seconds = time.perf_counter() - started
        share = (num_tokens / self.world.size, num_label_tokens / self.world.size)
        mfu = self.work.bound_s(self.rates, *share, len(batches)) / seconds
        metrics = StepMetrics(
            loss,
            grad_norm,
            int(num_tokens),
            seconds,
            mfu,
            skipped=fault is not None,
            interrupts=int(interrupts),
            written=int(written),
        )
        self.step_seconds.append((metrics.num_tokens, metrics.seconds))
        return metrics

    def _refresh(self, *_: Any) -> None:
        self._cancelled = self.loaded.refresh(self.world.device, defer=True)

    def _read(self, *numbers: Tensor) -> list[float]:
        """Returns `numbers` at once, the step's one wait for a GPU. *Collective*.

        Sees to rows that cancelled at the update: their norms are computed again before anything asks for them.
        """
        if self._cancelled is None:
            return torch.cat(numbers).tolist()  # type: ignore[no-any-return]
        *values, num_ranks = torch.cat([*numbers, summed(self.world, self._cancelled)]).tolist()
        if num_ranks:
            self.loaded.refresh(self.world.device)
        return values

    def _handle_bad_step(self, fault: str, batches: list[Batch], gradient_alone: bool) -> None:
        """Says what is wrong with the step and on which rows; stops, or lets the step be left out. *Collective*.

        Raises:
            TrainingError: as `train.on_bad_step` wants it, or too many steps in a row were bad.
        """
        skips = self.guard.record_skip()
        told = f"step {self.step + 1}: {fault}, on {self._worst_rows(batches, gradient_alone)}. Nothing was updated"
        if not skips:
            skipping = self.config.train.on_bad_step is OnBadStep.skip
            many = f", and {MAX_SKIPPED} steps before it were left out" if skipping else ""
            raise TrainingError(f"{told}{many}. Lower optim.learning_rate, or look at that data")
        if self.world.is_main:
            logger.warning("%s; going on without it", told)

    @torch.no_grad()
    def _worst_rows(self, batches: list[Batch], all_of_them: bool) -> str:
        """Where the samples with the highest loss come from, or all; a loss that is not finite is higher than any."""
        self.model.eval()
        own = [
            float(batch_loss(self.model, batch, self.world.device)) / max(1, batch.num_label_tokens)
            for batch in batches
        ]
        self.model.train()
        reshard(self.model)
        own = [loss if math.isfinite(loss) else math.inf for loss in own]
        worst = max(loss for losses in gather(self.world, own) for loss in losses)
        found = [
            sample
            for batch, loss in zip(batches, own, strict=True)
            if loss == worst or all_of_them
            for sample in batch.samples
        ]
        samples = sorted(sample for part in gather(self.world, found) for sample in part)
        places = ", ".join(self.train_loader.dataset.where(sample) for sample in samples[:3])
        return places + (f" and {len(samples) - 3} more samples" if len(samples) > 3 else "")

    def evaluate(self) -> float | None:
        """Mean loss a label token of the held-out data, or None where there is none. *Collective*."""
        if self.eval_loader is None:
            return None
        return mean_loss(self.model, self.eval_loader().epoch(), self.world)

    def _log(self, progress: Progress, metrics: StepMetrics | None, eval_loss: float | None) -> None:
        """Records the step; *collective* where the magnitudes are due."""
        record: dict[str, Any] = {"step": self.step}
        if metrics is not None:
            if math.isfinite(metrics.loss) and math.isfinite(metrics.grad_norm):
                record |= {"loss": metrics.loss, "grad_norm": metrics.grad_norm}
            record |= {
                "learning_rate": self.optimizer.param_groups[0]["lr"],
                "tokens_per_second": metrics.num_tokens / metrics.seconds,
                "mfu": metrics.mfu,
                "data_wait": metrics.data_wait,
                "checkpoint_stall_s": self.checkpoints.stall_s,
            }
            if metrics.skipped:
                record["skipped"] = True
            self.checkpoints.stall_s = 0.0
        record |= {"num_tokens": self.num_tokens, "memory_gib": memory_gib(self.world)}
        if eval_loss is not None:
            record["eval_loss"] = eval_loss
        drift: dict[str, float] = {}
        if eval_loss is not None or self.step % (DRIFT_EVERY * self.config.train.log_every) == 0:
            drift = self._magnitude_drift()
        if not self.world.is_main:
            return
        if metrics is not None or eval_loss is not None:
            mean = {"magnitude_drift": sum(drift.values()) / len(drift)} if drift else {}
            changed = {CHANGED: [asdict(change) for change in self.new_changes]} if self.new_changes else {}
            self.folder.log(record | mean | changed)
            self.new_changes = []
            layers = {f"magnitude_drift/{name}": value for name, value in drift.items()}
            self.tracker.log({**record, **layers}, self.step)
        rate, current = record.get("tokens_per_second"), record.get("learning_rate")
        progress.update(self.step, record.get("loss"), rate, eval_loss, current)

    def _magnitude_drift(self) -> dict[str, float]:
        """Mean |magnitude / initial - 1| a layer. *Collective*."""
        own = magnitude_drift(self.model)
        totals = all_sum(self.world, *(number for pair in own.values() for number in pair)) if own else []
        return {name: totals[2 * i] / totals[2 * i + 1] for i, name in enumerate(own)}

    def tokens_per_second(self) -> float:
        """Over this process's steps without the first, which holds warm-up; evaluation and saving left out."""
        steps = self.step_seconds[1:] or self.step_seconds
        seconds = sum(pair[1] for pair in steps)
        return sum(pair[0] for pair in steps) / seconds if seconds else 0.0


AddGradients = Callable[[Batch, Tensor], Tensor]
"""Adds a micro-batch's gradients to the parameters', given the step's label tokens over all ranks; returns its loss."""


def add_gradients(model: Any, world: World, batch: Batch, num_label_tokens: Tensor) -> Tensor:
    """Forward and backward of one micro-batch, see `accumulate_gradients`. *Collective* if sharded."""
    rows = Rows.of(batch.input_ids, batch.position_ids, batch.labels, world.device)
    return backward(model, rows, num_label_tokens, world)


def accumulate_gradients(
    model: Any,
    batches: list[Batch],
    world: World,
    *,
    reduce_each: bool = False,
    keep_gathered: bool = False,
    add: AddGradients | None = None,
) -> tuple[Tensor, Tensor]:
    """Leaves the step's gradients on the parameters. *Collective*.

    Returns the rank's own share of the loss, (), and label tokens and tokens of all ranks, (2,) float64, on the device,
    which is not waited for.
    The loss is the sum over label tokens divided by their number over all ranks and micro-batches, so that a division
    of the same samples changes a gradient by rounding only. Reducing the gradients divides by the ranks, which the loss
    makes up for. With `reduce_each` every micro-batch reduces, else the last one alone; with `keep_gathered` the others
    leave the weights gathered. `add` takes the place of `add_gradients`.
    """
    add = add or partial(add_gradients, model, world)
    counts = summed(world, sum(batch.num_label_tokens for batch in batches), sum(batch.num_tokens for batch in batches))
    num_label_tokens = counts[0].float()
    total = torch.zeros((), device=world.device)
    for index, batch in enumerate(batches):
        set_gradient_sync(model, reduce_each or index == len(batches) - 1, keep_gathered=keep_gathered)
        arm_watchdog(world)
        total += add(batch, num_label_tokens)
    average_gradients(model, world)
    return total, counts

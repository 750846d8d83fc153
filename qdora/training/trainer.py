"""The training loop: one optimiser step is `Trainer.train_step`."""

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch

from qdora.adapter.dora import magnitude_drift
from qdora.config import RunConfig
from qdora.data import Batch, BatchLoader
from qdora.errors import TrainingError
from qdora.model import LoadedModel
from qdora.model.loss import batch_loss, mean_loss
from qdora.optim import build_optimizer, clip_gradients, learning_rate, set_learning_rate
from qdora.parallel import World, all_sum, average_gradients, gather, set_gradient_sync
from qdora.run_folder import RunFolder
from qdora.tracking import Tracker
from qdora.training.bound import measure_rates, work_of
from qdora.training.memory import memory_gib
from qdora.training.progress import Progress

DRIFT_EVERY = 10
"""Logged steps between two records of how far the magnitudes have moved."""
SIGNAL_WINDOW_S = 5.0
"""A terminal's Ctrl-C reaches a rank twice, from the terminal and from torchrun; only a later one is a second one."""


@dataclass(slots=True)
class StepMetrics:
    """One optimiser step, over all ranks."""

    loss: float
    grad_norm: float
    num_tokens: int
    seconds: float
    mfu: float
    """Share of the time that the machine's own bound allows (`qdora.training.bound`)."""
    data_wait: float = 0.0
    """Share of the time that went into waiting for the batches."""


class Interrupt:
    """Notes SIGINT and SIGTERM, so that the step is finished and saved first. A second Ctrl-C ends the process."""

    def __init__(self) -> None:
        self.received: str | None = None
        self._at = 0.0

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and time.monotonic() - self._at > SIGNAL_WINDOW_S:
            raise KeyboardInterrupt
        if self.received is None:
            self.received, self._at = signal.Signals(number).name, time.monotonic()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handles the signals inside the block (in a main thread; nothing elsewhere)."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


class Trainer:
    """Runs the steps of one run from where `step` stands; `save` is called when a checkpoint is due."""

    def __init__(
        self,
        config: RunConfig,
        world: World,
        loaded: LoadedModel,
        train_loader: BatchLoader,
        eval_loader: Callable[[], BatchLoader] | None,
        folder: RunFolder,
    ) -> None:
        self.config, self.world, self.loaded, self.model = config, world, loaded, loaded.model
        self.train_loader, self.eval_loader = train_loader, eval_loader
        self.folder = folder
        self.tracker = Tracker()
        """Records nothing until the run has been accepted and another takes its place."""
        self.optimizer = build_optimizer(self.model, config.optim)
        # DoRA's row norms follow the weights here and nowhere else in training.
        self.optimizer.register_step_post_hook(lambda *_: loaded.refresh(world.device))
        self.num_steps = num_steps(config, train_loader)
        self.step = 0
        self.num_tokens = 0
        self.step_seconds: list[tuple[int, float]] = []
        self.rates = measure_rates(world, loaded.dtype)
        self.work = work_of(loaded, world, config.parallel)

    def run(self, save: Callable[["Trainer"], None]) -> str:
        """Trains to `num_steps`; returns the run's status, `finished` or `interrupted`. *Collective*.

        Raises:
            TrainingError: the loss or the gradient is not finite; the last checkpoint stays as it is.
        """
        train = self.config.train
        interrupt = Interrupt()
        steps = iter(self.train_loader)
        self.model.train()
        with (
            interrupt.listening(),
            Progress(self.num_steps, enabled=self.world.is_main, first_step=self.step) as progress,
        ):
            if self.step == 0:
                self._log(progress, None, self.evaluate())
            while self.step < self.num_steps:
                started = time.perf_counter()
                batches = next(steps)
                waited = time.perf_counter() - started
                metrics = self.train_step(batches)
                metrics.data_wait = waited / (waited + metrics.seconds)
                self.step += 1
                last = self.step == self.num_steps
                stop = all_sum(self.world, interrupt.received is not None)[0] > 0
                due = train.eval_every and self.step % train.eval_every == 0
                eval_loss = self.evaluate() if (last or due) and not stop else None
                if last or stop or eval_loss is not None or self.step % train.log_every == 0:
                    self._log(progress, metrics, eval_loss)
                if last or stop or (train.checkpoint_every and self.step % train.checkpoint_every == 0):
                    save(self)
                if stop and not last:
                    return "interrupted"
        return "finished"

    def train_step(self, batches: list[Batch]) -> StepMetrics:
        """One optimiser update from this rank's micro-batches. *Collective*."""
        started = time.perf_counter()
        loss, num_tokens, num_label_tokens = accumulate_gradients(
            self.model,
            batches,
            self.world,
            reduce_each=self.work.reduces_each,
            keep_gathered=self.work.gathers_once,
        )
        grad_norm = clip_gradients(self.model, self.config.optim.max_grad_norm, self.world.shard_group)
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise TrainingError(self._not_finite(batches, loss, grad_norm))
        set_learning_rate(self.optimizer, learning_rate(self.config.optim, self.step, self.num_steps))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.num_tokens += num_tokens
        seconds = time.perf_counter() - started
        share = (num_tokens / self.world.size, num_label_tokens / self.world.size)
        mfu = self.work.bound_s(self.rates, *share, len(batches)) / seconds
        metrics = StepMetrics(loss, grad_norm, num_tokens, seconds, mfu)
        self.step_seconds.append((num_tokens, metrics.seconds))
        return metrics

    @torch.no_grad()
    def _not_finite(self, batches: list[Batch], loss: float, grad_norm: float) -> str:
        """What to tell of a step that broke, with the rows of data to look at. *Collective*."""
        self.model.eval()
        bad = [not math.isfinite(float(batch_loss(self.model, batch, self.world.device))) for batch in batches]
        if not any(gather(self.world, any(bad))):  # it was the gradient: any row may be it
            bad = [True] * len(batches)
        own = [sample for batch, is_bad in zip(batches, bad, strict=True) if is_bad for sample in batch.samples]
        samples = sorted(sample for part in gather(self.world, own) for sample in part)
        places = ", ".join(self.train_loader.dataset.where(sample) for sample in samples[:3])
        more = f" and {len(samples) - 3} more samples" if len(samples) > 3 else ""
        return (
            f"step {self.step + 1}: the loss is {loss} and the gradient norm {grad_norm}, on {places}{more}. Nothing "
            "was updated. Lower optim.learning_rate, or look at that data"
        )

    def evaluate(self) -> float | None:
        """Mean loss a label token of the held-out data, or None where there is none. *Collective*."""
        if self.eval_loader is None:
            return None
        return mean_loss(self.model, self.eval_loader().epoch(), self.world)

    def _log(self, progress: Progress, metrics: StepMetrics | None, eval_loss: float | None) -> None:
        """Records the step; *collective* where the magnitudes are due."""
        record: dict[str, Any] = {"step": self.step}
        if metrics is not None:
            record |= {
                "loss": metrics.loss,
                "learning_rate": self.optimizer.param_groups[0]["lr"],
                "grad_norm": metrics.grad_norm,
                "tokens_per_second": metrics.num_tokens / metrics.seconds,
                "mfu": metrics.mfu,
                "data_wait": metrics.data_wait,
            }
        record |= {"num_tokens": self.num_tokens, "memory_gib": memory_gib(self.world)}
        if eval_loss is not None:
            record["eval_loss"] = eval_loss
        drift: dict[str, float] = {}
        if eval_loss is not None or self.step % (DRIFT_EVERY * self.config.train.log_every) == 0:
            drift = self._magnitude_drift()
        if not self.world.is_main:
            return
        if metrics is not None or eval_loss is not None:
            self.folder.log(record | ({"magnitude_drift": sum(drift.values()) / len(drift)} if drift else {}))
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


def accumulate_gradients(
    model: Any, batches: list[Batch], world: World, *, reduce_each: bool = False, keep_gathered: bool = False
) -> tuple[float, int, int]:
    """Leaves the step's gradients on the parameters; returns loss, tokens and label tokens of all ranks. *Collective*.

    The loss is the sum over label tokens divided by their number over all ranks and micro-batches, so that a division
    of the same samples changes a gradient by rounding only. Reducing the gradients divides by the ranks, which the loss
    makes up for. With `reduce_each` every micro-batch reduces, else the last one alone; with `keep_gathered` the others
    leave the weights gathered.
    """
    own = (sum(batch.num_label_tokens for batch in batches), sum(batch.num_tokens for batch in batches))
    num_label_tokens, num_tokens = all_sum(world, *own)
    total = torch.zeros((), device=world.device)
    for index, batch in enumerate(batches):
        set_gradient_sync(model, reduce_each or index == len(batches) - 1, keep_gathered=keep_gathered)
        loss = batch_loss(model, batch, world.device) / num_label_tokens
        (loss * world.size).backward()
        total += loss.detach()
    average_gradients(model, world)
    (loss_value,) = all_sum(world, float(total))
    return loss_value, int(num_tokens), int(num_label_tokens)


def num_steps(config: RunConfig, loader: BatchLoader) -> int:
    """Optimiser updates of the whole run."""
    if config.train.num_steps is not None:
        return config.train.num_steps
    epochs = 1.0 if config.train.num_epochs is None else config.train.num_epochs
    return max(1, math.ceil(epochs * loader.steps_per_epoch))

"""What a person sees while training runs: a live bar on a terminal, plain lines in a log, a table at the end."""

import time
from types import TracebackType
from typing import Self

from rich import progress as rich_progress
from rich.console import Console
from rich.table import Table
from rich.text import Text

LINE_INTERVAL_S = 10.0
LINES_A_RUN = 20


class Progress:
    """Context manager that shows the course of `total_steps` steps, of which `first_step` were done before.

    Prints nothing unless `enabled` (rank 0). The time left comes from the pace since the first step of this process,
    whose own time holds compilation and warm-up.
    """

    def __init__(self, total_steps: int, *, enabled: bool, first_step: int = 0) -> None:
        self._total_steps = total_steps
        self._enabled = enabled
        self._console = Console(highlight=False)
        self._bar: rich_progress.Progress | None = None
        self._pace_from: tuple[int, float] = (first_step, time.monotonic())
        self._first_step = first_step
        self._last_line: tuple[int, float] | None = None

    def __enter__(self) -> Self:
        self._pace_from = (self._first_step, time.monotonic())
        if self._enabled and self._console.is_terminal:
            self._bar = rich_progress.Progress(
                rich_progress.TextColumn("step {task.completed}/{task.total}"),
                rich_progress.BarColumn(bar_width=None),
                rich_progress.TextColumn("{task.description}"),
                console=self._console,
                expand=True,
            )
            self._bar.add_task("", total=self._total_steps, completed=self._first_step)
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def update(
        self,
        step: int,
        loss: float | None,
        tokens_per_second: float | None,
        eval_loss: float | None = None,
        learning_rate: float | None = None,
    ) -> None:
        """Shows the state after `step` (0: before the first), an evaluation always. What is None is left out."""
        if not self._enabled:
            return
        course = [f"loss {loss:.3f}"] if loss is not None else []
        if tokens_per_second is not None:
            course.append(f"{tokens_per_second:,.0f} tokens/s")
        if left := self._time_left(step):
            course.append(left)
        rare = [f"eval_loss {eval_loss:.3f}"] if eval_loss is not None else []
        if self._bar is not None:  # 80 columns hold no more than the course
            self._bar.update(self._bar.task_ids[0], completed=step, description="  ".join(course))
            if rare:
                self.message("  ".join([f"step {step}/{self._total_steps}", *rare]))
        elif rare or self._line_is_due(step):
            self._last_line = (step, time.monotonic())
            if learning_rate is not None:
                rare.append(f"learning_rate {learning_rate:.1e}")
            self.message("  ".join([f"step {step}/{self._total_steps}", *rare, *course]))

    def message(self, text: str) -> None:
        """Prints a line of its own, above the bar if there is one."""
        if self._enabled and self._bar is not None:
            self._console.print(Text(text), soft_wrap=True)
        elif self._enabled:
            print(text, flush=True)

    def _time_left(self, step: int) -> str:
        """`0:34 left`, or an empty string before the pace is known."""
        first, began = self._pace_from
        now = time.monotonic()
        if first == self._first_step < step:
            self._pace_from = (step, now)
        if step <= first:
            return ""
        return f"{_clock((now - began) / (step - first) * (self._total_steps - step))} left"

    def _line_is_due(self, step: int) -> bool:
        if self._last_line is None or step == self._total_steps:
            return True
        last_step, last_time = self._last_line
        return step - last_step >= self._total_steps / LINES_A_RUN or time.monotonic() - last_time >= LINE_INTERVAL_S


def summary_table(rows: list[tuple[str, str]], title: str) -> None:
    """Prints names and values under a title; a value wider than the console is folded, never cut."""
    table = Table(title=title, title_justify="left", title_style="bold", show_header=False)
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(Text(name), Text(value))
    Console(highlight=False).print(table)


def _clock(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"

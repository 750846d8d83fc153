"""The lines of a log, the bar of a terminal, and the closing table."""

import io
import re
from itertools import pairwise

import pytest
from rich.console import Console

from qdora.training import progress as module
from qdora.training.progress import Progress, summary_table


class Clock:
    """Stands in for `time`, so that the pace is the test's."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


@pytest.fixture(autouse=True)
def no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)


def steps_of(text: str) -> list[int]:
    return [int(step) for step in re.findall(r"^step (\d+)/", text, flags=re.MULTILINE)]


def test_disabled_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    with Progress(3, enabled=False) as progress:
        progress.update(1, 1.0, 100.0)
        progress.message("hello")
    assert capfd.readouterr() == ("", "")


def test_line_has_the_values_it_was_given(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(36, enabled=True) as progress:
        progress.update(0, None, None, eval_loss=4.03)
        clock.now += 2
        progress.update(12, 1.2341, 1812.4, learning_rate=1e-3)
    assert capsys.readouterr().out.splitlines() == [
        "step 0/36  eval_loss 4.030",
        "step 12/36  learning_rate 1.0e-03  loss 1.234  1,812 tokens/s  0:04 left",
    ]


def test_fast_run_prints_first_last_and_every_twentieth(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(205, enabled=True) as progress:
        for step in range(1, 206):
            clock.now += 0.01
            progress.update(step, 1.0, 100.0)
    steps = steps_of(capsys.readouterr().out)
    assert (steps[0], steps[-1]) == (1, 205)
    assert {later - earlier for earlier, later in pairwise(steps[:-1])} == {11}


def test_slow_run_prints_every_ten_seconds(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(1_000_000, enabled=True) as progress:
        for step in range(1, 31):
            clock.now += 2.5
            progress.update(step, 1.0, 100.0)
    assert steps_of(capsys.readouterr().out) == [1, 5, 9, 13, 17, 21, 25, 29]


def test_evaluation_is_always_printed(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(1000, enabled=True) as progress:
        for step in (1, 2, 3):
            progress.update(step, 1.0, 100.0, eval_loss=0.5 if step == 3 else None)
    assert steps_of(capsys.readouterr().out) == [1, 3]


def test_time_left_ignores_the_first_step_and_those_before_a_resume(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with Progress(110, enabled=True, first_step=100) as progress:
        clock.now += 500  # compilation
        progress.update(101, 1.0, 100.0)
        for step in (102, 103):
            clock.now += 600
            progress.update(step, 1.0, 100.0)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].endswith("1:10:00 left")


def test_terminal_shows_a_bar_with_messages_above(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=80, highlight=False)
    monkeypatch.setattr(module, "Console", lambda **_: console)
    message = "saved " + "x" * 120
    with Progress(36, enabled=True, first_step=4) as progress:
        progress.update(12, 1.234, 812.0)
        progress.message(message)
        progress.update(13, 1.2, 812.0, eval_loss=0.5, learning_rate=1e-3)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue()).replace("\r", "\n")
    assert message in text, "not wrapped"
    assert re.search(r"^step 13/36  eval_loss 0\.500\s*$", text, flags=re.MULTILINE)
    assert re.search(r"step 13/36 [━╸╺]+ loss 1\.200  812 tokens/s  \d+:\d\d left", text.splitlines()[-1])


def test_summary_table_folds_long_values_and_takes_markup_literally(capsys: pytest.CaptureFixture[str]) -> None:
    path = "/outputs/" + "long-folder-name/" * 10 + "report.png"
    summary_table([("held-out loss", "4.03 -> 0.45"), ("figure", path), ("next", "qdora chat [run=DIR]")], "Finished")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].strip() == "Finished"
    assert max(map(len, lines)) <= 80
    cells = "".join(line.rsplit("│", 2)[1].strip() for line in lines if line.count("│") == 3)
    assert path in cells
    assert "[run=DIR]" in cells

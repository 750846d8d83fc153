"""`qdora report`: reads what a run or a study has left, and writes report.html, for a run report.png too."""

from dataclasses import replace
from pathlib import Path

from qdora import parallel
from qdora.config import ReportConfig
from qdora.errors import CheckpointError, ConfigError
from qdora.files import check_writable, write_durably
from qdora.reporting.answers import sample_answers
from qdora.reporting.curves import write_report
from qdora.reporting.page import Page, render
from qdora.reporting.run_page import run_page
from qdora.reporting.study_page import study_page
from qdora.run_folder import RunFolder
from qdora.run_result import find_result

REPORT = "report.html"


def report(config: ReportConfig) -> int:
    """Writes the page that `config` asks for, and report.png beside a run's own; returns the exit status.

    Raises:
        QdoraError: there is no such run or study, its data or model cannot be used, or the page not be written.
    """
    folder = Path(str(config.run or config.study))
    output = Path(config.output) if config.output else folder / REPORT
    if config.output:
        check_writable("output", config.output)  # before answers, which take a model
    try:
        page = study_page(folder, output.parent) if config.study else _of_run(folder, config.num_answers)
        write_durably(output, render(page))
        if config.run and not config.output:
            write_run_figure(RunFolder(folder))
    except OSError as error:
        raise ConfigError(f"{error.filename or output} cannot be written or read: {error.strerror}") from None
    print(f"written to {output}: {output.stat().st_size / 1e6:.2f} MB, one file that needs no other")
    return 0


def write_run_figure(folder: RunFolder) -> None:
    """Draws a run's report.png from its metrics.jsonl."""
    config = folder.read_config()
    write_report(folder.metrics, folder.report, f"{config.run_id}: {config.adapter.method.name} on {config.model.path}")


def write_run_page(folder: RunFolder) -> None:
    """Writes a run's report.html from what lies in its folder; loads no model."""
    write_durably(folder.path / REPORT, render(run_page(folder, [])))


def _of_run(path: Path, num_answers: int) -> Page:
    folder = RunFolder(path)
    if not num_answers:
        return run_page(folder, [])
    stored = folder.read_config()
    if stored.data.eval is None:
        print("without sample answers: the run has no data.eval to take prompts from")
        return run_page(folder, [])
    world = parallel.start_alone("qdora report")
    try:
        result = find_result(folder, world)
    except (CheckpointError, ConfigError) as error:  # the rest of the page needs no weights
        print(f"without sample answers: {error}")
        return run_page(folder, [])
    if result.manifest is None and not folder.is_finished():
        print("without sample answers: the run is not finished, and has no checkpoint")
        return run_page(folder, [])
    result = replace(result, config=replace(result.config, data=stored.data))  # a checkpoint's may be older
    answers = sample_answers(result, num_answers)
    return run_page(folder, answers, None if result.manifest is None else result.manifest.step)

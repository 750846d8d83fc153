"""The launcher ends as its ranks did."""

import signal
import time
from pathlib import Path

import pytest

from tests.support.marks import nightly
from tests.support.processes import launcher, start_command

SLOW_LOADING = """
import time
from pathlib import Path
import qdora.training.run as training
from qdora.__main__ import main

def load_model(*arguments, **options):
    Path(FOLDER, "loading-" + str(arguments[5].rank)).touch()
    time.sleep(120)

training.load_model = load_model
main()
"""
"""`qdora`, but loading the model never ends; each rank says in FOLDER that it is there."""


@pytest.mark.parametrize("number", [signal.SIGTERM, *nightly(signal.SIGINT, signal.SIGUSR1)])
def test_interrupted_while_loading_is_not_said_to_be_saved(
    options: list[str], tmp_path: Path, number: signal.Signals
) -> None:
    script = tmp_path / "slow.py"
    script.write_text(SLOW_LOADING.replace("FOLDER", repr(str(tmp_path))))
    process = start_command([*launcher(2), str(script), "train", *options, f"output_dir={tmp_path}/run"])
    deadline = time.monotonic() + 240
    while len(list(tmp_path.glob("loading-*"))) < 2 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(number)
    told, _ = process.communicate(timeout=240)
    assert process.returncode == 75, told[-3000:]
    assert told.count("interrupted before training went on; the same command starts again") == 1
    assert "interrupted and saved" not in told
    assert "Traceback" not in told
    assert not (tmp_path / "run").exists()

"""Runs that record online, at a server that answers, is slow, fails, or is gone: W&B's real client, on loopback."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.marks import nightly
from tests.support.processes import end, run, start, wait_for_steps
from tests.support.runs import long_run, metrics_of, summary_of
from tests.support.wandb_server import KEY, WandbServer, serving

STEPS = 60
REST_S = 0.05
"""Before each step of runs to which something happens."""
TIMEOUT_S = 15
"""For a server that does not answer."""
START_S = 240.0
"""Of a run on a machine with other work."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[WandbServer]:
    """For this process and those that it starts; the user's own settings hidden."""
    with serving() as server:
        for name in ("MODE", "ENTITY", "PROJECT", "RUN_ID", "RESUME"):
            monkeypatch.delenv(f"WANDB_{name}", raising=False)
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
        monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))
        monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
        monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
        yield server


@pytest.fixture
def arguments(tiny: Path, data: Path, tmp_path: Path) -> list[str]:
    """A run that records online."""
    return [
        *long_run(tiny, data),
        f"train.num_steps={STEPS}",
        "tracker=wandb",
        "tracker.timeout_s=60",
        f"output_dir={tmp_path}/run",
    ]


def ended(process: "subprocess.Popen[str]") -> str:
    """What it printed; it ended well."""
    told, _ = process.communicate(timeout=240)
    assert process.returncode == 0, told
    assert "Traceback" not in told
    return told


def assert_complete(server: WandbServer, folder: Path) -> None:
    """Every step once, in order, with the losses of metrics.jsonl."""
    lines = [json.loads(server.history[offset]) for offset in sorted(server.history)]
    assert [line["_step"] for line in lines] == [record["step"] for record in metrics_of(folder)]
    assert [line.get("loss") for line in lines] == [record.get("loss") for record in metrics_of(folder)]


@pytest.mark.parametrize("nproc", [1, *nightly(2)])
def test_whole_run_and_its_adapter_arrive(
    server: WandbServer, arguments: list[str], tmp_path: Path, nproc: int
) -> None:
    told = ended(start([*arguments, "tracker.log_adapter=true"], nproc, rest_s=0))
    run_id = server.run_names[0]
    assert f"{server.url}/someone/qdora/runs/{run_id}" in told.replace("\n", "").replace("│", "").replace(" ", "")
    assert_complete(server, tmp_path / "run")
    assert server.exit_code == 0
    assert server.summary["status"] == "finished"
    assert server.config["adapter"]["value"]["rank"] == 4
    assert server.artifacts == [f"run-{run_id}-adapter"]
    sent = {name: content for name, content in server.uploads.items() if name.startswith("artifact/")}
    adapter = tmp_path / "run" / "adapter"
    assert sent == {f"artifact/{file.name}": file.read_bytes() for file in adapter.iterdir()}


@pytest.mark.nightly(paths=["qdora/tracking.py", "qdora/training/run.py"])
def test_killed_run_goes_on_in_the_same_wandb_run_with_every_step_once(
    server: WandbServer, arguments: list[str], tmp_path: Path
) -> None:
    """Killed twice, W&B's own process too, which leaves steps unsent that a checkpoint is ahead of."""
    for steps in (15, 40):
        process = start(arguments, 1, REST_S)
        wait_for_steps(tmp_path / "run", steps, process)
        end(process)
    ended(start(arguments, 1, rest_s=0))
    assert len(set(server.run_names)) == 1
    assert_complete(server, tmp_path / "run")


@pytest.mark.nightly
def test_outage_in_the_middle_is_made_up_for(server: WandbServer, arguments: list[str], tmp_path: Path) -> None:
    process = start([*arguments, "tracker.timeout_s=120"], 1, REST_S)
    wait_for_steps(tmp_path / "run", 10, process)
    server.refuse()
    wait_for_steps(tmp_path / "run", 40, process)
    server.listen()
    ended(process)
    assert_complete(server, tmp_path / "run")
    assert server.exit_code == 0


@pytest.mark.nightly(paths=["qdora/tracking.py", "qdora/training/run.py"])
def test_interrupted_run_is_preempted_and_one_that_fails_is_failed(
    server: WandbServer, arguments: list[str], tmp_path: Path
) -> None:
    process = start([*arguments, "train.num_steps=2000"], 1, REST_S)
    wait_for_steps(tmp_path / "run", 5, process)
    process.send_signal(signal.SIGTERM)
    told, _ = process.communicate(timeout=240)
    assert process.returncode == 75, told
    assert (server.summary["status"], server.exit_code, server.preempting) == ("preempted", 1, True)
    folder = tmp_path / "broken"
    process = start([*arguments, f"output_dir={folder}", "train.num_steps=40"], 1, REST_S)
    wait_for_steps(folder, 5, process)
    (folder / "adapter").touch()  # where the result is to be
    told, _ = process.communicate(timeout=240)
    assert process.returncode == 2, told
    assert "the results could not be written" in told
    assert (server.summary["status"], server.exit_code) == ("failed", 1)


@pytest.mark.parametrize("behaviour", ["refused", *nightly("slow", "failing", "gone")])
def test_server_that_does_not_come_back_holds_nothing_up_and_loses_nothing(
    server: WandbServer, arguments: list[str], tmp_path: Path, behaviour: str
) -> None:
    process = start([*arguments, f"tracker.timeout_s={TIMEOUT_S}"], 1, REST_S)
    wait_for_steps(tmp_path / "run", 10, process)
    if behaviour == "refused":
        server.refuse()
    else:
        server.behaviour = behaviour
    began = time.monotonic()
    wait_for_steps(tmp_path / "run", STEPS, process)
    steps_took = time.monotonic() - began
    told = ended(process)
    assert steps_took < server.slow_s, "a step waited for an answer"
    assert time.monotonic() - began < steps_took + TIMEOUT_S + 60
    assert summary_of(tmp_path / "run")["status"] == "finished"
    (folder,) = (tmp_path / "run" / "wandb").glob("run-*")
    assert f"wandb sync --include-online {folder}" in told
    with serving() as other:  # what was kept is all of it
        environment = {"WANDB_BASE_URL": other.url, "WANDB_API_KEY": KEY, "WANDB_MODE": "online"}
        done = run([sys.executable, "-m", "wandb", "sync", "--include-online", str(folder)], **environment)
        assert done.returncode == 0, done.stdout + done.stderr
        assert_complete(other, tmp_path / "run")
        assert set(other.run_names) == set(server.run_names)


@pytest.mark.parametrize("mode", nightly("online", "auto"))
def test_server_that_is_slow_from_the_start_leaves_the_run_offline(
    server: WandbServer, arguments: list[str], tmp_path: Path, mode: str
) -> None:
    server.behaviour = "slow"
    began = time.monotonic()
    told = ended(start([*arguments, f"tracker.timeout_s={TIMEOUT_S}", f"tracker.mode={mode}"], 1, rest_s=0))
    assert time.monotonic() - began < START_S + TIMEOUT_S
    assert told.count("W&B runs offline") == 1
    (file,) = (tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")
    assert file.stat().st_size
    assert not server.history

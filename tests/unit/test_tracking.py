"""W&B for real, offline or against a loopback server; what it recorded is read back from its .wandb file."""

import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import wandb

from qdora.config import TrackerConfig, TrackerKind, TrackerMode
from qdora.tracking import PROBE_TIMEOUT_S, Tracker, WandbTracker, make_tracker
from tests.support.runs import wandb_records
from tests.support.wandb_server import KEY, WandbServer, serving

pytestmark = pytest.mark.alone

NOBODY = "http://127.0.0.1:9"
TIMEOUT_S = 2
START_S = 10.0  # W&B's own process on a loaded machine; a hang lasts for minutes


@pytest.fixture(autouse=True)
def private_wandb(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Hides the user's own W&B settings, keeps every server on loopback, and forgets W&B's process-wide state."""
    for name in ("API_KEY", "MODE", "ENTITY", "PROJECT", "RUN_ID", "RESUME", "IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(f"WANDB_{name}", raising=False)
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("WANDB_BASE_URL", NOBODY)
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    yield
    with suppress(OSError):  # where the test ended W&B's process
        wandb.teardown()


def start(folder: Path, *, resume_id: str | None = None, is_main: bool = True, **options: Any) -> Tracker:
    return make_tracker(
        TrackerConfig(**{"timeout_s": TIMEOUT_S, **options}),
        output_dir=folder,
        run_id="identity 1",
        settings={"adapter": {"rank": 16}},
        resume_id=resume_id,
        is_main=is_main,
    )


def history(folder: Path) -> list[tuple[int, float]]:
    return [(record["item"]["_step"], record["item"]["loss"]) for record in wandb_records(folder, "history")]


def exit_codes(folder: Path) -> list[int]:
    """How the runs ended; W&B adds how long one took only where that is a second or more."""
    return [record["exit_code"] for record in wandb_records(folder, "exit")]


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "qdora.tracking"]


@pytest.mark.parametrize("options", [{"is_main": False}, {"kind": TrackerKind.none}, {}])
def test_null_tracker_records_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]) -> None:
    if not options:
        monkeypatch.setenv("WANDB_MODE", "disabled")
    tracker = start(tmp_path / "run", resume_id="abc", **options)
    tracker.log({"loss": 1.0}, step=1)
    tracker.log_adapter(tmp_path)
    tracker.finish("finished")
    assert type(tracker) is Tracker
    assert (tracker.id, tracker.location, tracker.notice) == ("abc", None, None)
    assert not (tmp_path / "run").exists()


def test_offline_run_reads_back(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    tracker = start(tmp_path, log_adapter=True)
    tracker.log({"eval_loss": 4.0, "loss": 4.5}, step=0)
    tracker.log({"loss": 1.5}, step=5)
    tracker.log({"loss": 9.0}, step=5)
    tracker.log_adapter(adapter)
    time.sleep(2)  # W&B takes its first sample of the system on its own time
    tracker.finish("finished")

    (run,) = wandb_records(tmp_path, "run")
    assert (run["project"], run["display_name"], run["run_id"]) == ("qdora", "identity 1", tracker.id)
    assert run["config"]["update"]["adapter"] == {"rank": 16}
    rows = [record["item"] for record in wandb_records(tmp_path, "history")]
    assert [(row["step"], row["_step"], row["loss"], row.get("eval_loss")) for row in rows] == [
        (0, 0, 4.5, 4.0),
        (5, 5, 1.5, None),
    ]
    assert wandb_records(tmp_path, "metric")[0]["step_metric"] == "step"
    assert wandb_records(tmp_path, "stats"), "system metrics"
    (artifact,) = wandb_records(tmp_path, "artifact")
    assert (artifact["type"], artifact["name"]) == ("adapter", f"run-{tracker.id}-adapter")
    (content,) = artifact["manifest"]["contents"]
    assert content["local_path"] == str(adapter / "adapter_config.json")
    assert exit_codes(tmp_path) == [0]
    assert tracker.location is not None
    assert Path(tracker.location).parent == tmp_path / "wandb"
    assert capfd.readouterr() == ("", ""), "W&B prints nothing of its own"


def test_adapter_is_recorded_only_when_asked(tmp_path: Path) -> None:
    tracker = start(tmp_path, mode=TrackerMode.offline)
    tracker.log_adapter(tmp_path)
    tracker.finish("failed")
    assert wandb_records(tmp_path, "artifact") == []
    assert exit_codes(tmp_path) == [1]


@pytest.mark.parametrize("mode", [TrackerMode.auto, TrackerMode.online])
def test_no_key_means_offline_with_one_notice(tmp_path: Path, mode: TrackerMode) -> None:
    tracker = start(tmp_path, mode=mode)
    tracker.finish("finished")
    assert tracker.notice is not None
    assert "no API key" in tracker.notice
    assert tracker.notice.endswith(f"wandb sync {tracker.location}")
    assert "\n" not in tracker.notice


def test_auto_with_unreachable_server_is_offline_fast(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    began = time.monotonic()
    tracker = start(tmp_path, timeout_s=60)
    assert time.monotonic() - began < PROBE_TIMEOUT_S + START_S
    tracker.log({"loss": 1.0}, step=1)
    tracker.finish("finished")
    assert f"{NOBODY} does not answer" in str(tracker.notice)
    assert history(tmp_path) == [(1, 1.0)]


def test_online_with_unreachable_server_is_bounded_and_falls_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    began = time.monotonic()
    tracker = start(tmp_path, mode=TrackerMode.online, resume_id="abc")
    tracker.log({"loss": 1.0}, step=1)
    tracker.finish("finished")
    assert time.monotonic() - began < TIMEOUT_S + 2 * START_S
    assert tracker.id == "abc"
    assert "offline" in str(tracker.notice)
    assert (1, 1.0) in history(tmp_path)


@pytest.mark.parametrize("environment", ["offline", "online"])
def test_auto_follows_wandb_mode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, environment: str) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_MODE", environment)
    tracker = start(tmp_path)
    tracker.finish("finished")
    # `online` skips the probe, so it is W&B that reports the failure.
    assert ("as configured" if environment == "offline" else "connection refused") in str(tracker.notice)


def test_malformed_key_means_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "short")
    tracker = start(tmp_path, mode=TrackerMode.online)
    tracker.finish("finished")
    assert "offline (WANDB_API_KEY invalid" in str(tracker.notice)


def test_unusable_folder_is_a_notice(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    tracker = start(tmp_path / "run", resume_id="abc")
    tracker.log({"loss": 1.0}, step=1)
    tracker.finish("finished")
    assert "records nothing" in str(tracker.notice)
    assert tracker.id == "abc"


def test_offline_resume_keeps_the_id_and_repeats_no_step(tmp_path: Path) -> None:
    first = start(tmp_path)
    for step in (1, 2, 3):
        first.log({"loss": float(step)}, step=step)
    first.finish("failed")
    time.sleep(1)  # the folder's name has the second in which the run started
    second = start(tmp_path, resume_id=first.id)
    for step in (2, 3, 4):
        second.log({"loss": float(step)}, step=step)
    second.finish("finished")
    assert second.id == first.id
    assert history(tmp_path) == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0)]


def test_training_goes_on_when_wandb_dies(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tracker = start(tmp_path)
    services = [child for child in psutil.Process().children(recursive=True) if child.name() == "wandb-core"]
    assert services
    for service in services:
        service.kill()
    psutil.wait_procs(services)
    for step in range(50):
        tracker.log({"loss": 1.0}, step=step)
        time.sleep(0.01)
    tracker.finish("finished")
    (warning,) = warnings(caplog)
    assert f"wandb sync {tracker.location}" in warning


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbServer]:
    with serving() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        yield server


def test_online_run_and_its_resume_upload_each_step_once(tmp_path: Path, server: WandbServer) -> None:
    first = start(tmp_path, timeout_s=30)
    for step in (1, 2, 3):
        first.log({"loss": 1.0}, step=step)
    first.finish("failed")
    assert isinstance(first, WandbTracker)
    assert first.notice is None
    assert first.location == f"{server.url}/someone/qdora/runs/{first.id}"
    second = start(tmp_path, resume_id=first.id, timeout_s=30)
    for step in (2, 3, 4):
        second.log({"loss": 1.0}, step=step)
    second.finish("finished")
    assert server.steps == [1, 2, 3, 4]


def test_finish_is_bounded_when_the_server_has_gone(
    tmp_path: Path, server: WandbServer, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = start(tmp_path, timeout_s=5)
    assert tracker.notice is None
    server.behaviour = "gone"
    began = time.monotonic()
    tracker.log({"loss": 1.0}, step=1)
    tracker.finish("finished")
    assert time.monotonic() - began < 5 + START_S
    (warning,) = warnings(caplog)
    assert "wandb sync" in warning
    assert (1, 1.0) in history(tmp_path)

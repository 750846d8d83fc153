"""W&B for real, offline or against a loopback server, read back from its .wandb file; elsewhere a run in its place.

Nothing here measures time: what has to give up does so on a wait of a fraction of a second, or the test never ends.
"""

import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from threading import Event, Timer
from typing import Any

import psutil
import pytest
import wandb

from qdora.config import TrackerConfig, TrackerKind, TrackerMode
from qdora.tracking import Tracker, WandbTracker, answers, make_tracker
from tests.support.runs import wandb_records
from tests.support.wandb_server import KEY, WandbServer, serving

NOBODY = "http://127.0.0.1:9"
TIMEOUT_S = 120
"""Until W&B gives up, which it does in no test: its process may take long to start beside others."""
RESCUE_S = 20
"""Until a call that hangs goes on, so that a test which waits for it fails instead of never ending."""


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


class FakeRun:
    """What a tracker uses of a `wandb.Run`."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.id, self.step, self.options = options["id"] or "new", 0, options
        self.url = f"https://wandb.test/{self.id}"
        self.dir = str(Path(options["dir"]) / "wandb" / "run" / "files")
        self.summary: dict[str, Any] = {}
        self.steps: list[int] = []
        self.artifacts: list[Any] = []
        self.exit_code: int | None = None
        self.preempting = False
        self.may_log, self.may_finish = Event(), Event()
        self.may_log.set()
        self.may_finish.set()

    def define_metric(self, name: str, step_metric: str) -> None:
        """Nothing of it is looked at."""

    def log(self, metrics: dict[str, float], step: int, commit: bool) -> None:
        self.may_log.wait()
        self.steps.append(step)

    def log_artifact(self, artifact: Any) -> None:
        self.artifacts.append(artifact)

    def mark_preempting(self) -> None:
        self.preempting = True

    def finish(self, exit_code: int) -> None:
        self.may_finish.wait()
        self.exit_code = exit_code


class FakeWandb:
    """In the place of `wandb.init`: the runs it has started, and the modes in which it was asked to."""

    def __init__(self) -> None:
        self.runs: list[FakeRun] = []
        self.modes: list[str] = []
        self.online_fails: Exception | None = None

    def init(self, **options: Any) -> FakeRun:
        self.modes.append(options["mode"])
        if options["mode"] == "online" and self.online_fails is not None:
            raise self.online_fails
        self.runs.append(FakeRun(options))
        return self.runs[-1]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    """W&B whose runs start no process."""
    fake = FakeWandb()
    monkeypatch.setattr(wandb, "init", fake.init)
    return fake


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


@pytest.mark.parametrize(
    ("options", "environment"),
    [
        ({"is_main": False}, {}),
        ({"kind": TrackerKind.none}, {}),
        ({}, {"WANDB_MODE": "disabled"}),
        ({}, {"WANDB_DISABLED": "true"}),
    ],
)
def test_null_tracker_records_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], environment: dict[str, str]
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    tracker = start(tmp_path / "run", resume_id="abc", **options)
    tracker.log({"loss": 1.0}, step=1)
    tracker.log_adapter(tmp_path)
    tracker.finish("finished")
    assert type(tracker) is Tracker
    assert (tracker.id, tracker.location, tracker.notice) == ("abc", None, None)
    assert not (tmp_path / "run").exists()


def test_offline_run_reads_back(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_X_STATS_SAMPLING_INTERVAL", "0.1")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    tracker = start(tmp_path, log_adapter=True)
    tracker.log({"eval_loss": 4.0, "loss": 4.5}, step=0)
    tracker.log({"loss": 1.5}, step=5)
    tracker.log({"loss": 9.0}, step=5)
    tracker.log_adapter(adapter)
    time.sleep(3)  # thirty times as long as until W&B's first sample of the system
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


def test_adapter_is_recorded_only_when_asked(tmp_path: Path, fake: FakeWandb) -> None:
    tracker = start(tmp_path, mode=TrackerMode.offline)
    tracker.log_adapter(tmp_path)
    tracker.finish("failed")
    assert fake.runs[0].artifacts == []


@pytest.mark.parametrize(
    ("status", "exit_code"),
    [("finished", 0), ("completed_without_last_checkpoint", 0), ("failed", 1), ("preempted", 1)],
)
def test_run_ends_as_it_did(tmp_path: Path, fake: FakeWandb, status: str, exit_code: int) -> None:
    start(tmp_path).finish(status)
    (run,) = fake.runs
    assert (run.summary, run.exit_code, run.preempting) == ({"status": status}, exit_code, status == "preempted")


@pytest.mark.parametrize("mode", [TrackerMode.auto, TrackerMode.online])
def test_no_key_means_offline_with_one_notice(tmp_path: Path, fake: FakeWandb, mode: TrackerMode) -> None:
    tracker = start(tmp_path, mode=mode)
    assert fake.modes == ["offline"]
    assert tracker.notice is not None
    assert "no API key" in tracker.notice
    assert tracker.notice.endswith(f"wandb sync {tracker.location}")
    assert "\n" not in tracker.notice


def test_auto_with_unreachable_server_is_offline_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fake: FakeWandb
) -> None:
    """W&B itself would try for as long as it may."""
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    tracker = start(tmp_path)
    tracker.log({"loss": 1.0}, step=1)
    tracker.finish("finished")
    assert f"{NOBODY} does not answer" in str(tracker.notice)
    assert fake.modes == ["offline"]
    assert fake.runs[0].steps == [1]


def test_server_that_accepts_and_never_answers_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QDORA_WANDB_PROBE_S", "0.2")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        assert not answers(f"http://127.0.0.1:{listener.getsockname()[1]}")


def test_online_with_unreachable_server_falls_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """W&B's own client gives up online; what is offline is not its matter."""
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    fake, real = FakeWandb(), wandb.init
    monkeypatch.setattr(wandb, "init", lambda **given: (real if given["mode"] == "online" else fake.init)(**given))
    tracker = start(tmp_path, mode=TrackerMode.online, resume_id="abc", timeout_s=1)
    tracker.log({"loss": 1.0}, step=1)
    tracker.finish("finished")
    assert tracker.id == "abc"
    assert "W&B runs offline" in str(tracker.notice)
    assert fake.runs[0].options["id"] == "abc"
    assert fake.runs[0].steps == [1]


def test_wandb_is_told_how_long_it_may_take(tmp_path: Path, fake: FakeWandb) -> None:
    start(tmp_path, timeout_s=7).finish("finished")
    settings = fake.runs[0].options["settings"]
    assert (settings.init_timeout, settings.finish_timeout, settings.finish_timeout_raises) == (7, 7, True)


@pytest.mark.parametrize("environment", ["offline", "online"])
def test_auto_follows_wandb_mode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fake: FakeWandb, environment: str
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_MODE", environment)
    fake.online_fails = wandb.errors.CommError("connection\nrefused")
    tracker = start(tmp_path)
    # `online` skips the probe, so it is W&B that reports the failure.
    assert fake.modes == (["offline"] if environment == "offline" else ["online", "offline"])
    assert ("as configured" if environment == "offline" else "offline (connection refused)") in str(tracker.notice)


def test_malformed_key_means_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """W&B refuses it before it starts a process."""
    monkeypatch.setenv("WANDB_API_KEY", "short")
    fake, real = FakeWandb(), wandb.init
    monkeypatch.setattr(wandb, "init", lambda **given: (real if given["mode"] == "online" else fake.init)(**given))
    tracker = start(tmp_path, mode=TrackerMode.online)
    assert "offline (WANDB_API_KEY invalid" in str(tracker.notice)
    assert fake.modes == ["offline"]


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
    time.sleep(1 - time.time() % 1)  # the folder's name has the second in which the run started
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
    first = start(tmp_path)
    for step in (1, 2, 3):
        first.log({"loss": 1.0}, step=step)
    first.finish("failed")
    assert isinstance(first, WandbTracker)
    assert first.notice is None
    assert first.location == f"{server.url}/someone/qdora/runs/{first.id}"
    second = start(tmp_path, resume_id=first.id)
    for step in (2, 3, 4):
        second.log({"loss": 1.0}, step=step)
    second.finish("finished")
    assert server.steps == [1, 2, 3, 4]


def test_key_of_netrc_makes_the_run_online(
    tmp_path: Path, server: WandbServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is where `wandb login` stores one."""
    monkeypatch.delenv("WANDB_API_KEY")
    (tmp_path / "netrc").write_text(f"machine 127.0.0.1:{server.port} login user password {KEY}\n")
    tracker = start(tmp_path)
    tracker.log({"loss": 1.0}, step=1)
    tracker.finish("finished")
    assert tracker.notice is None
    assert server.steps == [1]


def test_finish_gives_up_where_the_server_has_gone(
    tmp_path: Path, server: WandbServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """After a second, while it may take longer to start."""
    real = wandb.init

    def init(settings: wandb.Settings, **options: Any) -> wandb.Run:
        settings.finish_timeout = 1
        return real(settings=settings, **options)

    monkeypatch.setattr(wandb, "init", init)
    tracker = start(tmp_path)
    assert tracker.notice is None
    server.behaviour = "gone"
    tracker.log({"loss": 1.0}, step=1)
    tracker.finish("finished")
    (warning,) = warnings(caplog)
    assert "wandb sync" in warning
    deadline = time.monotonic() + 60  # W&B's own process may be writing it yet
    while (1, 1.0) not in history(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert (1, 1.0) in history(tmp_path)


def test_step_does_not_wait_for_a_call_that_hangs(tmp_path: Path, fake: FakeWandb) -> None:
    tracker = start(tmp_path)
    (run,) = fake.runs
    run.may_log.clear()
    rescue = Timer(RESCUE_S, run.may_log.set)
    rescue.start()
    for step in (1, 2, 3):
        tracker.log({"loss": 1.0}, step=step)
    assert not run.may_log.is_set(), "a step has waited until W&B went on"
    rescue.cancel()
    run.may_log.set()
    tracker.finish("finished")
    assert run.steps == [1, 2, 3]


def test_end_does_not_wait_for_a_call_that_hangs(
    tmp_path: Path, fake: FakeWandb, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("QDORA_WANDB_GRACE_S", "0.2")
    tracker = start(tmp_path, timeout_s=0)
    fake.runs[0].may_finish.clear()
    began = time.monotonic()
    tracker.finish("finished")
    assert time.monotonic() - began < 20
    (warning,) = warnings(caplog)
    assert "W&B failed in finish (no end within 0.2 s)" in warning
    fake.runs[0].may_finish.set()

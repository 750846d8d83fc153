"""Weights & Biases behind a null object: training calls its tracker without asking whether there is one.

Training never stops for W&B: starting and finishing are bounded by `timeout_s`, and after a failure the tracker warns
once and records nothing more. metrics.jsonl is the record that does not depend on it.
"""

import json
import logging
import netrc
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path
from queue import SimpleQueue
from threading import Event, Thread
from typing import Any, Literal
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import urlopen

import psutil

from qdora.config import TrackerConfig, TrackerKind, TrackerMode
from qdora.waits import wait_s

Errors = tuple[type[Exception], ...]
logger = logging.getLogger(__name__)


class Tracker:
    """Records nothing: on ranks other than 0, for `tracker=none`, and where W&B could not start.

    `id` is W&B's id of the run (a resumed one is kept even here, for the next checkpoint), `location` its address, or
    its folder when offline, and `notice` a line the user should see.
    """

    def __init__(self, *, id: str | None = None, location: str | None = None, notice: str | None = None) -> None:
        self.id, self.location, self.notice = id, location, notice

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Records the metrics of a step: one call a step, steps rising; a step recorded before is left out."""

    def log_adapter(self, folder: Path) -> None:
        """With `tracker.log_adapter=true`, records the adapter folder as an artifact. Its files must stay in place."""

    def finish(self, status: str) -> None:
        """Ends the run: `preempted` as W&B's own such state, `failed` as a failure. Nothing is recorded after it."""


class WandbTracker(Tracker):
    """Records in a started `wandb.Run`; `offline_reason` says why it is not online.

    A thread makes the calls, in order: whatever holds W&B up, no step waits for it. Steps up to `last_step` are left
    out.
    """

    def __init__(
        self, run: Any, config: TrackerConfig, errors: Errors, offline_reason: str | None, last_step: int
    ) -> None:
        self._run, self._config, self._errors, self._last_step = run, config, errors, last_step
        folder = Path(run.dir).resolve().parent
        self._sync = f"wandb sync {'' if offline_reason else '--include-online '}{folder}"
        super().__init__(id=run.id, location=str(folder) if offline_reason else run.url)
        if offline_reason:
            self.notice = f"W&B runs offline ({offline_reason}); upload it later with: {self._sync}"
        self._calls: SimpleQueue[tuple[str, Callable[[Any], object]] | None] = SimpleQueue()
        self._thread = Thread(target=self._make_calls, daemon=True)
        self._thread.start()
        self._calls.put(("define_metric", lambda run: run.define_metric("*", step_metric="step")))

    def log(self, metrics: dict[str, float], step: int) -> None:
        if step > self._last_step:
            self._last_step = step
            self._calls.put(("log", lambda run: run.log({**metrics, "step": step}, step=step, commit=True)))

    def log_adapter(self, folder: Path) -> None:
        def call(run: Any) -> None:
            import wandb

            artifact = wandb.Artifact(f"run-{run.id}-adapter", type="adapter")
            artifact.add_dir(str(folder.resolve()), policy="immutable")  # uploaded from there, without a copy
            run.log_artifact(artifact)

        if self._config.log_adapter:
            self._calls.put(("log_adapter", call))

    def finish(self, status: str) -> None:
        def call(run: Any) -> None:
            run.summary["status"] = status
            if status == "preempted":
                run.mark_preempting()
            run.finish(exit_code=1 if status in ("preempted", "failed") else 0)

        self._calls.put(("finish", call))
        self._calls.put(None)
        patience_s = self._config.timeout_s + wait_s("QDORA_WANDB_GRACE_S")
        self._thread.join(patience_s)
        if self._thread.is_alive():
            self._warn("finish", f"no end within {patience_s:g} s")

    def _make_calls(self) -> None:
        while (item := self._calls.get()) is not None:
            action, call = item
            if self._run is None:
                continue
            try:
                call(self._run)
            except self._errors as error:
                self._warn(action, _one_line(error))
                if action != "log_adapter":  # the artifact alone is lost
                    self._run = None

    def _warn(self, action: str, why: str) -> None:
        logger.warning(
            "W&B failed in %s (%s), which the run outlasts; upload what it has with: %s (metrics.jsonl has all of it)",
            action,
            why,
            self._sync,
        )


def make_tracker(
    config: TrackerConfig,
    *,
    output_dir: Path,
    run_id: str,
    settings: dict[str, object],
    resume_id: str | None,
    is_main: bool,
) -> Tracker:
    """Starts the W&B run `run_id` in `output_dir/wandb`, or goes on with the one whose W&B id is `resume_id`.

    Online where there is a key and the server answers, else offline with a notice; W&B's failures are not raised.
    `settings` becomes the run's config. Only the rank that `is_main` records.
    """
    if not is_main or config.kind is TrackerKind.none or _requested_mode(config) == "disabled":
        return Tracker(id=resume_id)
    # W&B's own crash reports would hold up the process's exit for 20 s where the server accepts and never answers.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb  # here, because it takes half a second that the other ranks need not spend
    from wandb.sdk.mailbox import HandleAbandonedError, MailboxClosedError
    from wandb.sdk.mailbox.mailbox_handle import ServerResponseError

    # ValueError: a malformed WANDB_* variable. The last three: W&B's service process refused, or is gone.
    errors = (wandb.Error, OSError, ValueError, MailboxClosedError, HandleAbandonedError, ServerResponseError)

    def start(mode: Literal["online", "offline"]) -> wandb.Run:
        options = wandb.Settings(silent=True, console="off", init_timeout=config.timeout_s)
        options.finish_timeout, options.finish_timeout_raises = config.timeout_s, True
        names: dict[str, Any] = {"project": config.project, "entity": config.entity, "name": run_id, "id": resume_id}
        return wandb.init(**names, dir=str(output_dir), resume="allow", config=settings, mode=mode, settings=options)

    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        # Global too: W&B announces its login before it looks at the run's settings.
        offline_reason = _offline_reason(config, wandb.setup(wandb.Settings(silent=True)).settings)
        if offline_reason is None:
            try:
                run = start("online")
                return WandbTracker(run, config, errors, None, run.step - 1)  # the server knows it
            except errors as error:
                offline_reason = _one_line(error)
                wandb.teardown()  # else the run's id stays taken
        last_step = _last_step_on_disk(output_dir, resume_id, config.timeout_s)
        return WandbTracker(start("offline"), config, errors, offline_reason, last_step)
    except errors as error:
        return Tracker(id=resume_id, notice=f"W&B could not start and records nothing: {_one_line(error)}")


def _last_step_on_disk(output_dir: Path, resume_id: str | None, timeout_s: float) -> int:
    """The last step that earlier offline parts of a run hold, or -1.

    W&B's process writes seconds later: killed with the run it has not, left alone it goes on and is waited for.
    """
    last = -1
    for file in (output_dir / "wandb").glob(f"offline-run-*-{resume_id}/run-{resume_id}.wandb"):
        deadline = time.monotonic() + timeout_s
        while _is_open(file) and time.monotonic() < deadline:
            time.sleep(0.2)
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)]
        for line in subprocess.run(command, capture_output=True, text=True, check=False).stdout.splitlines():
            record = json.loads(line)
            if record["type"] == "history":
                last = max(last, record["history"]["item"]["_step"])
    return last


def _is_open(file: Path) -> bool:
    for process in psutil.process_iter(["name"]):
        with suppress(psutil.Error):
            if process.info["name"] == "wandb-core" and str(file.resolve()) in {
                own.path for own in process.open_files()
            }:
                return True
    return False


def offline_reason(config: TrackerConfig) -> str | None:
    """Why a run would be recorded offline, or None; asks the server whether it is there."""
    import wandb

    try:
        return _offline_reason(config, wandb.setup(wandb.Settings(silent=True)).settings)
    except (wandb.Error, ValueError) as error:
        return _one_line(error)


def _requested_mode(config: TrackerConfig) -> str:
    """`tracker.mode`, or what WANDB_MODE says where that is `auto`, or WANDB_DISABLED, which others read."""
    mode = os.environ.get("WANDB_MODE", "").lower()
    if not mode and os.environ.get("WANDB_DISABLED", "").lower() in ("1", "true", "yes", "on"):
        mode = "disabled"
    return mode if config.mode is TrackerMode.auto and mode in ("online", "offline", "disabled") else config.mode.value


def _offline_reason(config: TrackerConfig, settings: Any) -> str | None:
    """Why the run is not to be online, if so. `settings` are W&B's own, from its files and environment."""
    mode, url = _requested_mode(config), settings.base_url
    if mode == "offline":
        return "as configured"
    if not (settings.api_key or settings.identity_token_file or _has_netrc_entry(urlsplit(url).netloc)):
        return "no API key, `wandb login` stores one"  # with `online` too: W&B would wait at a prompt
    return None if mode == "online" or answers(url) else f"{url} does not answer"


def _has_netrc_entry(host: str) -> bool:
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def answers(url: str) -> bool:
    """Whether something speaks HTTP at `url`, through the environment's proxies, within the wait for a probe."""
    answered, patience_s = Event(), wait_s("QDORA_WANDB_PROBE_S")

    def probe() -> None:
        with suppress(OSError, ValueError, HTTPException):
            with suppress(HTTPError):  # a refusal is an answer too
                urlopen(url, timeout=patience_s).close()
            answered.set()

    # In a thread, because the look-up of a host's name does not heed the timeout.
    thread = Thread(target=probe, daemon=True)
    thread.start()
    thread.join(patience_s)
    return answered.is_set()


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__

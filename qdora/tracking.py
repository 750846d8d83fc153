"""Weights & Biases behind a null object: training calls its tracker without asking whether there is one.

Training never stops for W&B: starting and finishing are bounded by `timeout_s`, and after a failure the tracker warns
once and records nothing more. metrics.jsonl is the record that does not depend on it.
"""

import logging
import netrc
import os
from collections.abc import Callable
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path
from threading import Event, Thread
from typing import Any, Literal
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import urlopen

from qdora.config import TrackerConfig, TrackerKind, TrackerMode

Errors = tuple[type[Exception], ...]
logger = logging.getLogger(__name__)
PROBE_TIMEOUT_S = 3.0


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
        """Ends the run, `finished` as a success and any other status as a failure. Nothing is recorded after it."""


class WandbTracker(Tracker):
    """Records in a started `wandb.Run`; `offline_reason` says why it is not online."""

    def __init__(self, run: Any, config: TrackerConfig, errors: Errors, offline_reason: str | None) -> None:
        self._run, self._config, self._errors = run, config, errors
        self._folder = Path(run.dir).resolve().parent
        super().__init__(id=run.id, location=str(self._folder) if offline_reason else run.url)
        self._last_step_path = self._folder.parent / f"last-step-{run.id}"
        self._last_step = run.step - 1  # of a resumed run the server knows it, offline the file below
        if offline_reason:
            self.notice = f"W&B runs offline ({offline_reason}); upload it later with: wandb sync {self._folder}"
            with suppress(FileNotFoundError, ValueError):
                self._last_step = int(self._last_step_path.read_text())
        self._guard("define_metric", lambda run: run.define_metric("*", step_metric="step"))

    def log(self, metrics: dict[str, float], step: int) -> None:
        if step > self._last_step:
            self._last_step = step
            self._guard("log", lambda run: run.log({**metrics, "step": step}, step=step, commit=True))
            self._guard("log", lambda run: self._last_step_path.write_text(str(step)))

    def log_adapter(self, folder: Path) -> None:
        def call(run: Any) -> None:
            import wandb

            artifact = wandb.Artifact(f"run-{run.id}-adapter", type="adapter")
            artifact.add_dir(str(folder.resolve()), policy="immutable")  # uploaded from there, without a copy
            run.log_artifact(artifact)

        if self._config.log_adapter:
            self._guard("log_adapter", call)

    def finish(self, status: str) -> None:
        def call(run: Any) -> None:
            run.summary["status"] = status
            run.finish(exit_code=0 if status == "finished" else 1)

        self._guard("finish", call)
        self._run = None

    def _guard(self, action: str, call: Callable[[Any], object]) -> None:
        try:
            if self._run is not None:
                call(self._run)
        except self._errors as error:
            self._run = None
            message = "W&B stopped recording in %s (%s), training goes on; upload what it has with: wandb sync %s"
            logger.warning(message, action, _one_line(error), self._folder)


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
                return WandbTracker(start("online"), config, errors, None)
            except errors as error:
                offline_reason = _one_line(error)
                wandb.teardown()  # else the run's id stays taken
        return WandbTracker(start("offline"), config, errors, offline_reason)
    except errors as error:
        return Tracker(id=resume_id, notice=f"W&B could not start and records nothing: {_one_line(error)}")


def _requested_mode(config: TrackerConfig) -> str:
    """`tracker.mode`, or what WANDB_MODE says where that is `auto`."""
    mode = os.environ.get("WANDB_MODE", "").lower()
    return mode if config.mode is TrackerMode.auto and mode in ("online", "offline", "disabled") else config.mode.value


def _offline_reason(config: TrackerConfig, settings: Any) -> str | None:
    """Why the run is not to be online, if so. `settings` are W&B's own, from its files and environment."""
    mode, url = _requested_mode(config), settings.base_url
    if mode == "offline":
        return "as configured"
    if not (settings.api_key or settings.identity_token_file or _has_netrc_entry(urlsplit(url).netloc)):
        return "no API key, `wandb login` stores one"  # with `online` too: W&B would wait at a prompt
    return None if mode == "online" or _answers(url) else f"{url} does not answer"


def _has_netrc_entry(host: str) -> bool:
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _answers(url: str) -> bool:
    """Whether something speaks HTTP at `url`, through the environment's proxies, within `PROBE_TIMEOUT_S`."""
    answered = Event()

    def probe() -> None:
        with suppress(OSError, ValueError, HTTPException):
            with suppress(HTTPError):  # a refusal is an answer too
                urlopen(url, timeout=PROBE_TIMEOUT_S).close()
            answered.set()

    # In a thread, because the look-up of a host's name does not heed the timeout.
    thread = Thread(target=probe, daemon=True)
    thread.start()
    thread.join(PROBE_TIMEOUT_S)
    return answered.is_set()


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__

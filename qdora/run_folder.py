"""A run's own folder: config.yaml, metrics.jsonl, summary.json, adapter/, checkpoints/, report.png."""

import json
import logging
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from qdora import checkpoint_folder
from qdora.adapter.trained_over import WEIGHTS
from qdora.changes import check_identity
from qdora.checkpoint_folder import Change, Manifest
from qdora.config import AdapterMethod, RunConfig
from qdora.config.values import config_from_values, config_values
from qdora.errors import CheckpointError, ConfigError
from qdora.files import existing, lock, read_json, write_durably
from qdora.waits import wait_s

logger = logging.getLogger(__name__)
ENDED = ("finished", "completed_without_last_checkpoint")
"""States of a run whose result is there."""
CHANGES = "changes"
"""Key of config.yaml besides the options."""


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl, none if there is no file; a line that a killed run left torn is passed over."""
    records = []
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with suppress(json.JSONDecodeError):
                records.append(json.loads(line))
    return [record for record in records if isinstance(record, dict) and "step" in record]


class RunFolder:
    """Paths and files of one run; the methods that write are for rank 0."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metrics = path / "metrics.jsonl"
        self.adapter = path / "adapter"
        self.model = path / "model"
        self.checkpoints = path / "checkpoints"
        self.report = path / "report.png"
        self.summary = path / "summary.json"
        self.config = path / "config.yaml"
        self._unwritten: list[str] = []
        self._lock: int | None = None

    def find_checkpoint(self, config: RunConfig, *, in_full: bool = True) -> tuple[Path, Manifest] | None:
        """The checkpoint to go on from under `config.resume`, or None for a fresh start.

        Args:
            in_full: takes the folder and reads the checkpoint's files, to know whether they are what was written; else
                it only looks at what they say of themselves, and changes nothing.

        Raises:
            ConfigError: the folder is of another run, or not empty where a new one is wanted.
            CheckpointError: `resume` names a path without a whole checkpoint, or all of the folder's are damaged.
        """
        _check_can_be_made(self.path)
        if in_full and self.path.exists():
            self._take()
        same_command = self.config.exists() and self._stored_config().get("resume") == config.resume
        if config.resume == "never" and not same_command:
            if self._holds_something():
                raise ConfigError(
                    f"resume=never wants a new folder, but {self.path} is not empty: give another output_dir, or leave "
                    "out resume=never to go on with what is there"
                )
            return None
        self._check_same_run(config)
        # The same command again goes on from what it had made; else it would begin at `resume` each time.
        if config.resume != "auto" and not (same_command and checkpoint_folder.complete(self.checkpoints)):
            if config.resume == "never":
                return None
            path = _named(config.resume, in_full)
            found = path, checkpoint_folder.read_manifest(path)
        else:
            newest = self._newest_valid() if in_full else checkpoint_folder.newest_readable(self.checkpoints)
            if newest is None:
                return None
            found = newest
        check_identity(config, found[1].config, str(found[0]))
        return found

    def _newest_valid(self) -> tuple[Path, Manifest] | None:
        newest, messages = checkpoint_folder.latest_valid(self.checkpoints)
        for message in messages:
            logger.warning("%s", message)
        return None if newest is None else (newest, checkpoint_folder.read_manifest(newest))

    def _check_same_run(self, config: RunConfig) -> None:
        if not self._holds_something():
            return
        if not self.config.exists():
            raise ConfigError(f"output_dir={self.path} holds files that are not of a run: give another folder")
        check_identity(config, self._stored_config(), str(self.path))

    def _holds_something(self) -> bool:
        """Also what is half written may be left of a start that failed."""
        return self.path.exists() and any(file.suffix != ".partial" for file in self.path.iterdir())

    def _take(self) -> None:
        """Locks the folder for this process, as long as it lives.

        Raises:
            ConfigError: a run is going on in it.
        """
        if self._lock is None:
            self._lock = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        deadline = time.monotonic() + wait_s("QDORA_LOCK_PATIENCE_S")
        while not lock(self._lock):
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"a run is going on in {self.path}: wait for its end, stop it, or give another output_dir"
                )
            time.sleep(0.2)

    def release(self) -> None:
        """Lets other runs have the folder."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def see(self, mark: Path, option: str, use: str) -> None:
        """Waits for a file that another machine has made there.

        Args:
            option: what the folder was given as.
            use: what the ranks do in the folder, for the message.

        Raises:
            ConfigError: it does not come: the folder is not the same one on each machine.
        """
        deadline = time.monotonic() + wait_s("QDORA_SEEN_AFTER_S")
        while not mark.exists():
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"{option}={self.path} is not the same folder on every machine, and {use}: put it on a file system "
                    "that they share"
                )
            time.sleep(0.2)

    def _stored_config(self) -> dict[str, Any]:
        try:
            stored = yaml.safe_load(self.config.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(f"{self.config} is damaged: {' '.join(str(error).split())}") from None
        if not isinstance(stored, dict):
            raise ConfigError(f"{self.config} is damaged: it holds no options")
        return stored

    def read_config(self) -> RunConfig:
        """The configuration that the run in this folder was last started with.

        Raises:
            ConfigError: there is no run here.
        """
        if not self.config.exists():
            raise ConfigError(f"run={self.path}: no run there (no {self.config.name})")
        values = self._stored_config()
        values.pop(CHANGES, None)
        return config_from_values(RunConfig, values)

    def read_changes(self) -> list[Change]:
        """What was changed when the run was resumed, by config.yaml: oldest first, the last values being its own."""
        stored = self._stored_config().get(CHANGES, []) if self.config.exists() else []
        try:
            return [Change(**change) for change in stored]
        except TypeError:
            raise ConfigError(f"{self.config} is damaged: {CHANGES} is not a list of changes") from None

    def is_finished(self) -> bool:
        """Whether the run ended and its result is there."""
        if not self.summary.exists() or not (self.adapter.exists() or self.model.exists()):
            return False
        weights = self.adapter / WEIGHTS
        if weights.exists() and not weights.stat().st_size:
            return False
        with suppress(ValueError, TypeError, KeyError):  # damaged: made again
            return bool(json.loads(self.summary.read_text(encoding="utf-8"))["status"] == "finished")
        return False

    def has_ended(self, config: RunConfig) -> bool:
        """Tells whether what lies there as the run's result is its last, or there is no checkpoint to take instead."""
        result = self.model if config.adapter.method is AdapterMethod.none else self.adapter
        if not result.exists():
            return False
        return read_json(self.summary).get("status") in ENDED or not checkpoint_folder.complete(self.checkpoints)

    def start(self, config: RunConfig, first_step: int, changes: Sequence[Change] = ()) -> None:
        """Takes the folder and writes config.yaml; the summary goes, and of steps after `first_step` the metrics, too.

        Checkpoints of such steps are set aside: those steps are made again.

        Args:
            changes: what the steps up to `first_step` had otherwise than `config`, from the first start on.

        Raises:
            ConfigError: another run has the folder, or it cannot be written.
        """
        values = config_values(config) | ({CHANGES: [asdict(change) for change in changes]} if changes else {})
        text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._take()
            write_durably(self.config, text)
            self.summary.unlink(missing_ok=True)
            kept = [record for record in self.read_metrics() if record["step"] <= first_step] if first_step else []
            write_durably(self.metrics, "".join(json.dumps(record) + "\n" for record in kept))
            checkpoint_folder.supersede(self.checkpoints, first_step)
        except OSError as error:
            raise ConfigError(f"output_dir={self.path} cannot be written: {error}") from None

    def read_metrics(self) -> list[dict[str, Any]]:
        """The records of metrics.jsonl."""
        return read_metrics(self.metrics)

    def log(self, record: dict[str, Any]) -> None:
        """Appends a line to metrics.jsonl; what a full disk does not take is appended with a later one."""
        self._unwritten.append(json.dumps(record) + "\n")
        try:
            self.flush()
        except OSError as error:
            if len(self._unwritten) == 1:
                logger.warning("%s could not be written, its lines are kept for later: %s", self.metrics, error)

    def flush(self) -> None:
        """Appends what is kept, or raises `OSError`."""
        size = self.metrics.stat().st_size if self.metrics.exists() else 0
        try:
            with self.metrics.open("a", encoding="utf-8") as file:
                file.write("".join(self._unwritten))
        except OSError:
            with suppress(OSError):
                os.truncate(self.metrics, size)  # half a line would spoil the next
            raise
        self._unwritten.clear()

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Writes summary.json."""
        write_durably(self.summary, json.dumps(summary, indent=2) + "\n")


def _check_can_be_made(folder: Path) -> None:
    """Raises `ConfigError` before anything is loaded; what the system refuses all the same shows when it is made."""
    there = existing(folder)
    if not there.is_dir() or not os.access(there, os.W_OK):
        what = "cannot be written" if there.is_dir() else "is a file"
        raise ConfigError(f"output_dir={folder} cannot be made: {there} {what}")


def _named(resume: str, in_full: bool) -> Path:
    """Returns the checkpoint that `resume` names, itself or by a file `latest`.

    Raises:
        CheckpointError: there is none, or (`in_full`) it is damaged.
    """
    found = Path(resume)
    if found.name == checkpoint_folder.LATEST and found.is_file():
        found = found.parent / found.read_text(encoding="utf-8").strip()
    if not (found / checkpoint_folder.MANIFEST).exists():
        raise CheckpointError(
            f"resume={resume}: no checkpoint there (no {checkpoint_folder.MANIFEST}); it is auto, never, "
            "or the folder of one, such as RUN/checkpoints/step-00000010"
        )
    reason = checkpoint_folder.damage(found) if in_full else None
    if reason is not None:
        raise CheckpointError(f"resume={resume} is damaged: {reason}")
    return found

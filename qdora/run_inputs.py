"""What a run trains on and from, by content: compared with what lies under those names now."""

from contextlib import suppress
from pathlib import Path

from qdora import checkpoint_folder
from qdora.config import RunConfig
from qdora.data.sources import content
from qdora.errors import ConfigError, DataError, ModelError
from qdora.files import read_json
from qdora.model.checkpoint_files import CheckpointFiles
from qdora.run_folder import RunFolder


def inputs(config: RunConfig, base: Path | None) -> dict[str, str | None]:
    """Hashes of what a run trains on and from, by option; None of what lies on the hub.

    Args:
        base: the folder of the model, if that is to be among them.

    Raises:
        DataError: the data is not there.
        ModelError: the model is not.
    """
    data = {"data.train": config.data.train, "data.eval": config.data.eval}
    told = {name: content(source) for name, source in data.items() if source is not None}
    return told if base is None else told | {"model.path": CheckpointFiles(base).fingerprint()}


def check_base(run: RunFolder, base: Path) -> None:
    """Compares a base with the one that a run was trained over, where its summary or a checkpoint knows that.

    Raises:
        ConfigError: it is another one.
        ModelError: it is none.
    """
    known = read_json(run.summary).get("model_fingerprint")
    if not known and (newest := checkpoint_folder.newest_readable(run.checkpoints)) is not None:
        known = newest[1].model_fingerprint
    if known not in (None, CheckpointFiles(base).fingerprint()):
        raise ConfigError(
            f"run={run.path} was trained over another model than the one in {base}: its weights differ. Give the "
            "right one as model.path=DIR"
        )


def replaced(run: RunFolder, config: RunConfig) -> list[str]:
    """Returns options of `config` whose files are there and are not what the run was trained with, by its summary."""
    base = Path(str(config.model.path))
    summary = read_json(run.summary)
    then = {"model.path": summary.get("model_fingerprint"), **summary.get("data_fingerprints", {})}
    now: dict[str, str | None] = {}
    with suppress(DataError, ModelError):  # a finished run needs neither
        now = inputs(config, base if base.is_dir() else None)
    return [name for name, value in now.items() if None not in (value, then.get(name)) and value != then[name]]

"""What two starts of a run may differ in: refused where it would be another run; else told, and recorded with its step.

Without torch, whose import takes seconds: a refusal shows before.
"""

from collections.abc import Container, Iterable
from pathlib import Path
from typing import Any

from qdora.checkpoint_folder import Change, Manifest
from qdora.config import Attention, RunConfig
from qdora.config.values import as_word, config_values, flatten, option, usual_options
from qdora.errors import ConfigError
from qdora.files import is_hub_id

_IDENTITY = ("model", "quant", "adapter", "data", "seed")
"""Groups that make a run what it is: a checkpoint continues only under the same values."""
_HARMLESS = {"data.cache_dir", "data.eval", "data.train", "model.path"}
"""Data and model that were moved are the same: the checkpoint knows their fingerprints."""
_OF_A_START = {"run_id", "output_dir", "resume", "allow_changes"}
"""Options that say which run is started, and how."""
_TENSORS = {
    "lora": {"A", "B"},
    "dora": {"A", "B", "magnitude"},
    "vera": {"d", "b"},
    "dvora": {"d", "b", "magnitude"},
    "none": {"weights"},
}
"""What a checkpoint of each method holds."""
_ONLY_SHOWN = (
    *("tracker.", "plan.", "parallel.", "train.log_", "train.checkpoint_", "train.keep_", "train.report"),
    "data.cache_dir",
)
"""Beginnings of options that change where things are, and nothing of what is learned or measured."""
RANKS = "ranks"


def differing(ours: dict[str, Any], theirs: dict[str, Any], but: Container[str]) -> list[str]:
    """Names of the flat options `ours` that are not as in `theirs`, apart from those in `but`."""
    different = [name for name in ours if name not in but and ours[name] != theirs.get(name)]
    name = "model.attention"  # `auto` is another one on another machine, and computes the same
    kinds = {attention.name: attention.untrained for attention in Attention}
    if name in different and kinds[ours[name]] is kinds.get(theirs.get(name, "")):
        different.remove(name)
    return different


def _both(config: RunConfig, stored: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the flat options of `config` and of an older one; an option unknown then was as it is by default."""
    return flatten(config_values(config)), usual_options() | with_one_epoch(flatten(stored))


def with_one_epoch(stored: dict[str, Any]) -> dict[str, Any]:
    """Returns the flat options of a run with the epoch that one of an earlier commit made where it gave no length."""
    has_length = stored.get("train.num_steps") is not None or stored.get("train.num_epochs") is not None
    return stored if has_length else stored | {"train.num_epochs": 1.0}


def check_identity(config: RunConfig, stored: dict[str, Any], where: str) -> None:
    """Refuses to go on with a run or a checkpoint under options that make another run.

    Args:
        stored: the config of the run or the checkpoint, as values.
        where: its folder.

    Raises:
        ConfigError: an option differs that may not; the message has both values and what to do.
    """
    ours, theirs = _both(config, stored)
    ours = {name: value for name, value in ours.items() if name.partition(".")[0] in _IDENTITY}
    different = differing(ours, theirs, _HARMLESS)
    unfit = _do_not_fit(ours, theirs)
    if not different or (config.allow_changes and not unfit):
        return
    # The way back names a place only where something is there: what was moved is compared by its content.
    paths = [name for name in ("data.train", "model.path") if ours[name] != theirs.get(name)]
    back = " ".join(
        option(name, theirs.get(name))
        for name in [*different, *(name for name in paths if _may_be_there(theirs.get(name)))]
    )
    different += paths
    pairs = ", ".join(f"{name}={as_word(theirs.get(name))} (now {as_word(ours[name])})" for name in different)
    useless = f", whose tensors do not fit ({', '.join(unfit)})" if config.allow_changes else ""
    forward = None if unfit else "goes on all the same"
    raise ConfigError(f"{where} belongs to another run: it has {pairs}{useless}. {ways_out(config, back, forward)}")


def _may_be_there(path: Any) -> bool:
    """Returns whether a model or data are at `path`, or may be on the hub."""
    return Path(str(path)).expanduser().exists() or is_hub_id(str(path))


def _do_not_fit(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """Returns the options by which a checkpoint lacks tensors, or has them of another shape."""
    methods = [values["adapter.method"] for values in (ours, theirs)]
    unfit = [] if _TENSORS[methods[0]] <= _TENSORS.get(methods[1], set()) else ["adapter.method"]
    has_rank = "none" not in methods
    return unfit + (["adapter.rank"] if has_rank and ours["adapter.rank"] != theirs["adapter.rank"] else [])


def ways_out(config: RunConfig, back: str, forward: str | None = "goes on all the same") -> str:
    """Returns what a user can do where a run is not gone on with.

    Args:
        back: the options that go on with the run as it was.
        forward: what `allow_changes=true` does; None where it does not help.
    """
    without = "" if config.resume in ("auto", "never") else f", without resume={config.resume},"
    ways = [f"{back} goes on with it", f"output_dir=ANOTHER{without} begins a new run"]
    return "; ".join([*ways, *([f"allow_changes=true {forward}"] if forward else [])])


def changes_since(
    config: RunConfig, num_ranks: int, manifest: Manifest, fingerprints: dict[str, tuple[str, str]] | None = None
) -> list[Change]:
    """Returns what holds from the step after a checkpoint and did not hold up to it.

    Args:
        config: as it is given now.
        fingerprints: of what is not told by an option, then and now.
    """
    ours, theirs = _both(config, manifest.config)
    pairs: dict[str, tuple[Any, Any]] = {RANKS: (manifest.world_size, num_ranks), **(fingerprints or {})}
    pairs |= {name: (theirs.get(name), ours[name]) for name in differing(ours, theirs, _OF_A_START)}
    return [
        Change(from_step=manifest.step + 1, option=name, before=before, now=now)
        for name, (before, now) in pairs.items()
        if before != now
    ]


def shown_change(change: Change) -> str:
    """Returns an option with both values."""
    return f"{change.option} {as_word(change.before)} -> {as_word(change.now)}"


def shown(changes: Iterable[Change]) -> list[str]:
    """Returns a line for each step from which something changed."""
    by_step: dict[int, list[str]] = {}
    for change in changes:
        by_step.setdefault(change.from_step, []).append(shown_change(change))
    return [f"from step {step}: {', '.join(pairs)}" for step, pairs in by_step.items()]


def of_learning(changes: Iterable[Change]) -> list[Change]:
    """Returns the changes that bear on what is learned, or on how it is measured."""
    return [change for change in changes if not change.option.startswith(_ONLY_SHOWN)]


def over_time(name: str, now: str, changes: Iterable[Change]) -> str:
    """Returns the values of an option with the steps for which each held; `now` alone where it never changed.

    Args:
        now: the last value, in the words in which it is to be shown.
    """
    own = [change for change in changes if change.option == name]
    spans = [f"{as_word(change.before)} up to step {change.from_step - 1}" for change in own]
    return ", ".join([*spans, f"{now} from step {own[-1].from_step}"]) if own else now

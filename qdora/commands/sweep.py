"""`qdora train -m ...`: several runs, one for each combination of the values that options are given.

Hydra's sweeper makes the combinations. Its folder, beside what `qdora.commands.members` keeps there:

    output_dir/
      sweep.json, sweep.png       all members together
      multirun.yaml               Hydra's record of the sweep
      rank-8+seed-1/              the folder of a run, named after what it does not share with the others
"""

import os
from contextlib import suppress
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from qdora.commands.members import STOP, run_members, short_hash, signals_told, taken
from qdora.commands.sweep_results import conclude
from qdora.errors import EXIT_PREEMPTED, ConfigError

_FOLDER = ("output_dir", "hydra.sweep.dir")


def sweep(arguments: list[str]) -> int:
    """Runs the sweep that the overrides say, or what is left of it; returns the exit status.

    0 where all runs are finished, 75 where the sweep was told to stop (the same command goes on), else that of the
    first run that is not.

    Raises:
        ConfigError: the overrides are not those of a sweep.
    """
    if "RANK" in os.environ:
        raise ConfigError("-m starts the ranks of each run itself: call launch/train.sh -m ... without torchrun")
    options = _parsed(arguments)
    swept = {_key(option) for option in options if option.is_sweep_override()}
    fixed = [option for option in options if _key(option) not in swept | set(_FOLDER)]
    folder = _folder(options)
    kept = [text for text in arguments if text not in {o.input_line for o in options if _key(o) in _FOLDER}]
    with taken(folder) as began, signals_told(folder / STOP):
        try:
            run_members(folder, kept, frozenset(option.get_key_element() for option in fixed))
        finally:
            shared = [str(option.input_line) for option in fixed if not _key(option).startswith("hydra")]
            status = conclude(folder, shared, began)
        if (folder / STOP).stat().st_size == 0:
            return status
    print(f"interrupted; the same command goes on with what is left of the sweep in {folder}", flush=True)
    return EXIT_PREEMPTED


def _parsed(arguments: list[str]) -> list[Override]:
    """The overrides among the arguments; what is wrong with the others Hydra says itself."""
    parser, options = OverridesParser.create(), []
    for argument in arguments:
        with suppress(HydraException):
            options.append(parser.parse_override(argument))
    return options


def _key(option: Override) -> str:
    return str(option.key_or_group)


def _folder(options: list[Override]) -> Path:
    """The sweep's folder: what `output_dir` says, else one whose name the same options always get.

    Raises:
        ConfigError: `output_dir` is empty, or several.
    """
    given = [option for option in options if _key(option) in _FOLDER]
    if not given:
        texts = sorted(str(option.input_line) for option in options if not _key(option).startswith("hydra"))
        return Path("outputs", f"sweep-{short_hash(*texts)}")
    if given[-1].is_sweep_override() or not given[-1].value():
        raise ConfigError(f"{given[-1].input_line}: give one folder, in which each run of the sweep gets its own")
    return Path(str(given[-1].value()))

"""From the command line to a typed configuration: the only code that knows Hydra and OmegaConf.

A command is a name, the dataclass of its options, its YAML in `conf/` and the function that does it. Hydra composes the
YAML over the dataclasses and applies the overrides; what is passed on is the dataclass alone.
"""

import gc
import importlib
import io
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from qdora import config
from qdora.commands.explain import check_known, explain, own_yaml
from qdora.commands.help import describe
from qdora.commands.spelling import in_grammar, replace_mappings, without_folders
from qdora.config.commands import naming
from qdora.errors import EXIT_KEYBOARD, EXIT_PREEMPTED, EXIT_USER_ERROR, ConfigError, QdoraError, nearest
from qdora.files import output_may_close
from qdora.interrupt import Terminated, interrupt, terminated
from qdora.rank_files import leave_error
from qdora.waits import check_waits, wait_s

HELP = ("-h", "--help")
MULTIRUN = {"-m", "--multirun"}
_FOR_HYDRA = re.compile(r"-|[+~]*hydra\b")
"""What an argument begins with that only Hydra's own command line takes."""


@dataclass(frozen=True, slots=True)
class Command:
    """One word after `qdora`."""

    config_class: type
    target: str
    """`module:function`, imported only when it is called; takes the dataclass, returns the exit status."""
    summary: str
    can_resume: bool = False
    """Whether a signal may end it anywhere, as the same command goes on."""
    keeps: bool = False
    """Whether the same command goes on after one that was interrupted at once."""
    check: str | None = None
    """`module:function`, called first: what it refuses shows before `target` and its libraries are imported."""


COMMANDS = {
    "train": Command(
        config.RunConfig,
        "qdora.training.run:train",
        "fine-tune a model",
        can_resume=True,
        check="qdora.training.resume:check_early",
    ),
    "merge": Command(
        config.MergeConfig, "qdora.merging:merge", "write base and adapter as one ordinary checkpoint", keeps=True
    ),
    "evaluate": Command(
        config.EvaluateConfig, "qdora.evaluation:evaluate", "score a run or a model on held-out data", keeps=True
    ),
    "study": Command(config.StudyConfig, "qdora.commands.study:study", "compare methods, each at its best"),
    "generate": Command(config.GenerateConfig, "qdora.generation:generate", "answer a prompt, as it is made"),
    "chat": Command(config.ChatConfig, "qdora.generation:chat", "talk with a run or a model"),
    "analyze": Command(config.AnalyzeConfig, "qdora.analysis:analyze", "say how training changed the weights"),
    "report": Command(config.ReportConfig, "qdora.reporting.run:report", "write a run or a study as one HTML page"),
    "plan": Command(config.PlanConfig, "qdora.planning.run:plan", "say what fits on given cards, and its command"),
    "show": Command(config.ShowConfig, "qdora.show:show", "print data as a model is trained on it"),
    "doctor": Command(config.DoctorConfig, "qdora.doctor:doctor", "check whether a run can start on this machine"),
}


def run(arguments: list[str]) -> int:
    """Runs one command on this rank and returns the exit status; a user's mistake is one message on rank 0."""
    is_main = int(os.environ.get("RANK", 0)) == 0
    try:
        check_waits()
        if not arguments or arguments[0] in HELP:
            print(_usage())
            return 0 if arguments else EXIT_USER_ERROR
        name = arguments[0]
        if name == "--version":
            print(f"qdora {metadata.version('qdora')}")
            return 0
        if name not in COMMANDS:
            raise ConfigError(f"unknown command {name!r}{nearest(name, COMMANDS)}; there are: {', '.join(COMMANDS)}")
        overrides = [argument for argument in arguments[1:] if argument not in HELP]
        help_wanted = len(overrides) < len(arguments) - 1
        if not MULTIRUN.isdisjoint(overrides):
            if name != "train":
                raise ConfigError(f"-m is a sweep of training runs: qdora train -m ..., there is none of {name}")
            overrides = [override for override in overrides if override not in MULTIRUN]
            if not help_wanted:
                return load("qdora.commands.sweep:sweep")(in_grammar(overrides, config.RunConfig, sweep=True))
        values = compose(name, overrides)
        if values is None:
            return 0
        if help_wanted:
            if is_main:
                _show(describe(name, COMMANDS[name].config_class, values, conf_folder()))
            return 0
        with naming(override.lstrip("+").partition("=")[0] for override in overrides):
            return _call(COMMANDS[name], values)
    except QdoraError as error:
        if not leave_error(error):
            _print_once(error, is_main)
        return EXIT_USER_ERROR
    except KeyboardInterrupt as pressed:
        if is_main:
            command = COMMANDS.get(arguments[0]) if arguments else None
            then = "the same command goes on" if command and command.keeps else "nothing new was saved"
            print(f"qdora: interrupted at once; {then}", file=sys.stderr, flush=True)
        return EXIT_PREEMPTED if isinstance(pressed, Terminated) else EXIT_KEYBOARD


def _print_once(error: QdoraError, is_main: bool) -> None:
    """On rank 0; ranks of plain torchrun wait, so that one which knows it alone tells it, and another only then."""
    under_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
    if under_torchrun and not is_main:
        # torchrun ends all ranks as soon as one has failed: that must be rank 0, which tells what all know.
        time.sleep(wait_s("QDORA_GRACE_S"))
    if under_torchrun or is_main:
        print(f"qdora: {error}", file=sys.stderr, flush=True)


def conf_folder() -> Path:
    """`conf/` of a checkout, or the copy inside an installed package."""
    package = Path(__file__).resolve().parent.parent
    installed = package / "conf"
    return installed if installed.is_dir() else package.parent / "conf"


def compose(name: str, arguments: list[str]) -> DictConfig | None:
    """The configuration of a command under the given overrides; None where Hydra did something else (`--cfg`).

    Raises:
        ConfigError: an override names nothing, or has a value of the wrong type.
    """
    config_class = COMMANDS[name].config_class
    for_hydra = any(_FOR_HYDRA.match(argument) for argument in arguments)
    arguments, folders = without_folders(in_grammar(arguments, config_class), config_class, conf_folder())
    composed: list[DictConfig] = []
    if for_hydra:
        run_hydra(name, arguments, composed.append)
    else:  # Hydra's command line would compose twice, to learn first whether it is a sweep
        with _schema(name, arguments), hydra.initialize_config_dir(str(conf_folder()), "qdora", version_base="1.3"):
            composed.append(hydra.compose(name, arguments))
    for values in composed:
        if OmegaConf.get_type(values) is not config_class:
            raise ConfigError(own_yaml(name))
        for option, folder in folders.items():
            OmegaConf.update(values, option, folder)
        replace_mappings(values, arguments, config_class)
    return composed[0] if composed else None


def run_hydra(name: str, arguments: list[str], function: Callable[[DictConfig], None]) -> None:
    """Hydra's own command line: calls `function` with the configuration, in a sweep with that of each member.

    Raises:
        ConfigError: an override names nothing, or has a value of the wrong type.
    """
    said = io.StringIO()
    # Hydra's parser takes overrides only beside each other.
    in_order = sorted(arguments, key=lambda text: not text.startswith("-") and ("=" in text or text.startswith("~")))
    with _schema(name, arguments), _environment(sys.argv, [f"qdora {name}", *in_order]):
        try:
            with redirect_stderr(said):
                hydra.main(version_base="1.3", config_path=str(conf_folder()), config_name=name)(function)()
        except SystemExit as left:  # argparse, on what begins with a dash
            if left.code:
                what = said.getvalue().strip().rpartition("error: ")[2]
                raise ConfigError(f"{what}. Options are written name=value; --help lists them") from None
            raise
    sys.stderr.write(said.getvalue())


@contextmanager
def _schema(name: str, arguments: list[str]) -> Iterator[None]:
    """Makes the options of a command known to Hydra, and explains what Hydra and OmegaConf say of the overrides."""
    config_class = COMMANDS[name].config_class
    for other, command in COMMANDS.items():
        if issubclass(config_class, command.config_class):  # show takes what train does, a YAML file of one's own too
            ConfigStore.instance().store(name=f"{other}_schema", node=config_class)
    try:
        yield
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise ConfigError(explain(error, name, config_class, conf_folder(), arguments)) from None


def typed(values: DictConfig, config_class: type) -> Any:
    """The dataclass of a composed configuration; its checks run here.

    Raises:
        ConfigError: an option that does not exist, a value that is not allowed, values that contradict each other.
    """
    check_known(values, config_class)
    try:
        return OmegaConf.to_object(values)
    except OmegaConfBaseException as error:
        cause = error.__cause__
        raise (cause if isinstance(cause, ConfigError) else ConfigError(str(error).splitlines()[0])) from None


@contextmanager
def _environment(argv: list[str], replacement: list[str]) -> Iterator[None]:
    """Hydra reads `sys.argv`; without HYDRA_FULL_ERROR it prints its errors itself and exits with 1."""
    before, full_error = list(argv), os.environ.get("HYDRA_FULL_ERROR")
    argv[:] = replacement
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    finally:
        argv[:] = before
        os.environ.pop("HYDRA_FULL_ERROR")
        if full_error is not None:
            os.environ["HYDRA_FULL_ERROR"] = full_error


def _call(command: Command, values: DictConfig) -> int:
    typed_config = typed(values, command.config_class)
    with interrupt.listening() if command.can_resume else terminated() if command.keeps else nullcontext():
        try:
            if command.check is not None:
                _function(command.check)(typed_config)
            return load(command.target)(typed_config)
        except Exception as error:
            leave_error(error)  # while signals are heard: the launcher ends this rank once another has failed
            raise


def load(target: str) -> Callable[[Any], int]:
    """The function `module:function`; turns the search for garbage on again, which `qdora.__main__` has turned off.

    Modules stay: not searching while they are loaded, nor in them later, saves a fifth of a short run.
    """
    loaded: Callable[[Any], int] = _function(target)
    if not gc.isenabled():
        gc.freeze()
        gc.enable()
    return loaded


def _function(target: str) -> Any:
    module, function = target.split(":")
    return getattr(importlib.import_module(module), function)


def _show(text: str) -> None:
    with output_may_close():
        print(text, flush=True)


def _usage() -> str:
    lines = [f"  {name:10}{command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: qdora COMMAND [option=value ...]",
            *lines,
            "",
            "qdora COMMAND --help lists its options; --cfg job prints the configuration instead of running.",
        ]
    )

"""What is merged: a base model, how it was quantised for training, and an adapter."""

from dataclasses import dataclass
from pathlib import Path

from qdora.adapter import peft_format
from qdora.adapter.peft_config import base_named
from qdora.adapter.trained_over import find_quant, is_stored_in_4_bits
from qdora.config import AdapterConfig, DataConfig, MergeConfig, ModelConfig, QuantConfig
from qdora.config.commands import overlaid
from qdora.errors import ConfigError
from qdora.model import check_vocabulary, load_tokenizer, model_folder
from qdora.model.companions import Stored, has_tokenizer, stored_template
from qdora.model.folder import other_base
from qdora.parallel import World
from qdora.run_folder import RunFolder
from qdora.run_inputs import check_base
from qdora.run_result import RunResult, find_result
from qdora.template_variables import with_defaults


@dataclass(frozen=True, slots=True)
class Parts:
    """A base model, an adapter, and where they come from."""

    base: Path
    """Folder of the base model."""
    model: ModelConfig
    quant: QuantConfig
    """What the base was quantised to while the adapter was trained."""
    adapter_folder: Path
    adapter: AdapterConfig
    result: RunResult | None
    """What the run that trained the adapter left, where that is known."""
    data: DataConfig
    """The run's data options, or the usual ones."""
    is_known: bool = True
    """Whether `quant` is known to be what the adapter was trained over."""
    named_base: str | None = None
    """The base that the adapter names, where that is another one."""
    template: Stored | None = None
    """The chat template with the variables of `model`, where it sets any."""

    @property
    def is_stored_in_4_bits(self) -> bool:
        """Whether the base has no original weights in its folder."""
        return is_stored_in_4_bits(self.base)

    @classmethod
    def of(cls, config: MergeConfig, world: World) -> "Parts":
        """Finds what `config` names.

        Raises:
            QdoraError: the run has neither ended nor a checkpoint, or base or adapter cannot be read.
        """
        if config.run is None:
            result, data = None, DataConfig()
            model, folder = config.model, Path(str(config.adapter))
        else:
            result = find_result(RunFolder(Path(config.run)), world)
            stored = result.config
            model, quant, data = overlaid(stored.model, config.model), stored.quant, stored.data
            folder = _adapter_folder(result)
        adapter = peft_format.read_config(folder)
        base, is_known, named = model_folder(model), True, None
        if result is None:
            quant, is_known = find_quant(folder, config.quant, base)
            told = other_base(folder, model, base)
            if told is not None:
                named = base_named(folder)
                print(told)
        if not is_known:
            print(
                f"nothing says what the adapter in {folder} was trained over: it is merged into the base as it is "
                "stored. If it was trained over NF4 (QLoRA), quant=nf4 merges it into what it was trained over"
            )
        if result is not None:
            try:
                check_base(result.run, base)
            except ConfigError as error:
                if config.model.path is None:
                    raise
                named = str(stored.model.path)
                print(f"{error} (right where that one was stored in 4 bits and this one is what it was made from)")
        _check_tokenizer(base, model, folder)
        variables, stored_one = model.chat_template_kwargs, stored_template(folder) or stored_template(base)
        template = with_defaults(stored_one, variables) if variables else None
        return cls(base, model, quant, folder, adapter, result, data, is_known, named, template)


def _adapter_folder(result: RunResult) -> Path:
    if result.adapter is not None:
        return result.adapter
    run = result.run
    if result.checkpoint is not None:
        raise ConfigError(
            f"run={run.path} trains every weight and is not finished: its end writes an ordinary checkpoint, which "
            "needs no merge"
        )
    raise ConfigError(f"run={run.path} trained every weight: model.path={run.model} is an ordinary checkpoint already")


def _check_tokenizer(base: Path, model: ModelConfig, adapter: Path) -> None:
    """Holds a tokenizer that an adapter brings to the base, and says where its chat template replaces another."""
    if has_tokenizer(adapter):
        check_vocabulary(base, load_tokenizer(base, model, adapter))
    own, replaced = stored_template(adapter), stored_template(base)
    if own is not None and replaced is not None and own != replaced:
        print(
            f"the chat template in {adapter} takes the place of that in {base}: it is what the adapter was trained with"
        )

"""What adapter_config.json may say: the options that qdora's layers have, and those of PEFT that they have not."""

import re
from pathlib import Path
from typing import Any

from qdora.adapter.tensor_names import with_peft
from qdora.adapter.trained_over import CONFIG
from qdora.errors import AdapterError
from qdora.files import read_json

_REFUSED = {
    "modules_to_save": "trains whole copies of these modules beside the low-rank factors",
    "lora_bias": "adds a bias to each low-rank product (which PEFT merges where the layers have biases of their own)",
    "trainable_token_indices": "trains rows of the embedding",
    "layer_replication": "lets layers stand several times in the model",
    "alora_invocation_tokens": "adapts only what follows certain tokens (aLoRA)",
    "use_qalora": "shares values of the input in groups (QALoRA)",
    "use_bdlora": "makes factors of blocks (BD-LoRA)",
    "arrow_config": "mixes several adapters by the token (Arrow)",
    "monteclora_config": "draws around the factors (MonteCLoRA)",
    "kasa_config": "cuts the base's weights (KaSA)",
}
"""Options of PEFT that change the arithmetic and that qdora's layer does not have, and what they do."""
_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Ways of PEFT to start an adapter that subtract it from the base model's weights."""


def check_supported(folder: Path, values: dict[str, Any], is_vera: bool) -> None:
    """Raises `AdapterError` for what PEFT computes and qdora's layer does not."""
    kind = values.get("peft_type")
    if not is_vera and kind != "LORA":
        raise AdapterError(
            f"{folder}: peft_type={kind!r}, and only LORA (DoRA too), VERA and DVORA load here: {with_peft(folder)}"
        )
    refused = {name: what for name, what in _REFUSED.items() if values.get(name)}
    if values.get("bias", "none") != "none":
        refused["bias"] = "trains the biases of the base"
    for name, what in refused.items():
        raise AdapterError(f"{folder}: {name}={values[name]!r} {what}: {with_peft(folder)}")
    if str(values.get("init_lora_weights")).startswith(_CHANGE_THE_BASE):
        raise AdapterError(
            f"{folder}: init_lora_weights={values['init_lora_weights']!r} changes the base model's weights when PEFT "
            "loads it; convert it first: save_pretrained(DIR, path_initial_model_for_weight_conversion=...)"
        )


def check_numbers(file: Path, values: dict[str, Any]) -> None:
    """Raises `AdapterError` for what is not the number, or the patterns of numbers, that it should be."""
    wanted: dict[str, tuple[type, ...]] = {"r": (int,), "projection_prng_key": (int,)}
    wanted |= dict.fromkeys(("lora_alpha", "lora_dropout", "vera_dropout"), (int, float))
    for name, kinds in wanted.items():
        if not isinstance(values.get(name, 0), kinds) or isinstance(values.get(name), bool):
            raise AdapterError(f"{file}: {name} is {values[name]!r}, which is no number that it can be")
    if values["r"] < 1:
        raise AdapterError(f"{file}: r is {values['r']}; it must be at least 1")
    for name in ("rank_pattern", "alpha_pattern"):
        patterns = values.get(name) or {}
        try:
            good = all(isinstance(value, int | float) for value in patterns.values())
            [re.compile(pattern) for pattern in patterns]
        except (AttributeError, TypeError, re.error):
            good = False
        if not good:
            raise AdapterError(f"{file}: {name} is {patterns!r}; it must map regular expressions to numbers")


def by_pattern(patterns: dict[str, float], name: str, usual: float) -> float:
    """The value of the pattern that PEFT takes for a layer: the first that is the end of its name, or from `^` all."""
    for pattern, value in patterns.items():
        whole = pattern if pattern.startswith("^") else rf"(.*\.)?({pattern})$"
        if re.match(whole, name):
            return value
    return usual


def base_named(folder: Path) -> str | None:
    """Returns the base model that adapter_config.json names."""
    named = read_json(folder / CONFIG).get("base_model_name_or_path")
    return named if isinstance(named, str) and named else None


def other_base_asked(folder: Path) -> str:
    """Returns what to do where an adapter does not fit a base."""
    named = base_named(folder)
    if named is None:
        return f"Its {CONFIG} names no base: give the one that it was trained over as model.path"
    return f"Its {CONFIG} names {named} as its base: give that as model.path"

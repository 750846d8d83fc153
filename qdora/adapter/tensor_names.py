"""Names of an adapter's tensors: as PEFT and qdora write them, and as files from elsewhere have them.

PEFT's files have `base_model.model.` + the layer + `.lora_A.weight`. Understood beside that:

    the adapter's name within            q_proj.lora_A.default.weight, .lora_magnitude_vector.default(.weight)
    older magnitudes                     q_proj.lora_magnitude_vector.weight
    another way to the same layer        no base_model.model.; model.language_model. or language_model.model. where
                                         a text model has model.; what torch.compile and FSDP put between

A layer is therefore known by its name from the first part on that is no wrapper (`root`), on both sides.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from qdora.adapter.trained_over import WEIGHTS
from qdora.errors import AdapterError

PREFIX = "base_model.model."
SUFFIXES = {
    "lora_a": ".lora_A.weight",
    "lora_b": ".lora_B.weight",
    "vera_d": ".vera_lambda_d",
    "vera_b": ".vera_lambda_b",
    "magnitude": ".lora_magnitude_vector",
}
PROJECTIONS = {"base_model.vera_A": "shared_a", "base_model.vera_B": "shared_b"}
"""VeRA's matrices, which all layers share."""
_WRAPPERS = {"base_model", "model", "module", "language_model", "text_model"}
"""Parts before the layers of a decoder: its own, of PEFT, of DDP, and of models that see and read."""
_BETWEEN = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_TENSOR = re.compile(
    r"(?P<layer>.+)\.(?:(?P<matrix>lora_[AB])(?:\.(?P<one>[^.]+))?\.weight"
    r"|(?P<vector>lora_magnitude_vector|vera_lambda_[db])(?:\.(?P<other>(?!weight$)[^.]+))?(?:\.weight)?)"
)
_PROJECTION = re.compile(r"(?:base_model\.)?(?P<matrix>vera_[AB])(?:\.(?P<one>[^.]+))?")
_UNSUPPORTED = {
    r".*\.lora_embedding_[AB](\..+)?": "LoRA on an embedding",
    r".*\.lora_[AB](\..+)?\.bias": "a bias beside LoRA's factors (lora_bias)",
    r".*trainable_tokens_(delta|indices).*": "trained rows of the embedding (trainable_token_indices)",
    r"(?!.*lora_).*\.base_layer\.(weight|bias)": "a whole weight of the base beside LoRA on embedding or head",
    r"(?!.*lora_).*\.(weight|bias)": "whole weights beside the low-rank factors (modules_to_save; or an embedding of "
    "another vocabulary, to whose size BASE comes first by resize_token_embeddings)",
}
SHOWN = 3
"""Names in a message."""


def tensor_name(layer: str, kind: str) -> str:
    """Returns the name under which `kind` (a key of `SUFFIXES`) of a layer is stored."""
    return PREFIX + layer + SUFFIXES[kind]


def root(layer: str) -> str:
    """Returns a layer's name without what wraps the decoder: `layers.0.mlp.up_proj`, whatever the model around is."""
    parts = [part for part in layer.split(".") if part not in _BETWEEN]
    first = next((place for place, part in enumerate(parts) if part not in _WRAPPERS), len(parts) - 1)
    return ".".join(parts[first:])


def with_peft(folder: Path) -> str:
    """Returns what to do with an adapter that PEFT computes and qdora does not."""
    return (
        "qdora does not support that. Merge it with PEFT and give the result as model.path: PeftModel.from_pretrained("
        f"AutoModelForCausalLM.from_pretrained(BASE), '{folder}').merge_and_unload().save_pretrained(NEW), and BASE's "
        "tokenizer beside it"
    )


def shown(names: Sequence[str]) -> str:
    """Returns the first few of some names, and how many more there are."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


class TensorNames:
    """The tensors of an adapter file by layer and kind, whatever program named them.

    Raises:
        AdapterError: names that are of no LoRA, DoRA, VeRA or DVoRA adapter; several adapters in one file.
    """

    def __init__(self, keys: Iterable[str], file: Path) -> None:
        self.layers: list[str] = []
        """The layers as the file names them, without `base_model.model.`, in its order."""
        self.projections: dict[str, str] = {}
        """Key of `PROJECTIONS` to the name in the file."""
        self._keys: dict[tuple[str, str], str] = {}
        self._file = file
        kinds = {suffix.split(".")[1]: kind for kind, suffix in SUFFIXES.items()}
        unknown, adapters = [], set()
        for key in keys:
            projection, found = _PROJECTION.fullmatch(key), _TENSOR.fullmatch(key)
            if projection:
                self.projections[f"base_model.{projection['matrix']}"] = key
                adapters.add(projection["one"])
            elif found:
                adapters.add(found["one"] or found["other"])
                self._add(found["layer"], kinds[found["matrix"] or found["vector"]], key)
            else:
                unknown.append(key)
        if unknown or not self._keys:
            raise AdapterError(self._refusal(unknown))
        if len(adapters) > 1:
            names = ", ".join(sorted(map(str, adapters - {None})))
            raise AdapterError(f"{file} holds several adapters ({names}): save the one that is meant alone")

    def _add(self, layer: str, kind: str, key: str) -> None:
        other = self._keys.setdefault((root(layer), kind), key)
        if other != key:
            raise AdapterError(f"{self._file} holds {other} and {key}, which are of one layer: take one of them out")
        layer = layer.removeprefix(PREFIX)
        if kind in ("lora_a", "vera_d"):
            self.layers.append(layer)

    def _refusal(self, unknown: list[str]) -> str:
        example = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
        for pattern, what in _UNSUPPORTED.items():
            named = [key for key in unknown if re.fullmatch(pattern, key)]
            if named and self._keys:
                return f"{self._file} holds {what}: {shown(sorted(named))}. {with_peft(self._file.parent)}"
        odd = f"{len(unknown)} tensors whose names are of no LoRA, DoRA or VeRA adapter: {shown(sorted(unknown))}"
        what = odd if unknown else "no tensor of an adapter"
        return (
            f"{self._file} holds {what}. Expected are PEFT's names, such as {example} (.default within and other "
            "prefixes are understood): convert it to PEFT's format with the program that wrote it, which is "
            "PeftModel.save_pretrained of a PEFT model"
        )

    def get(self, layer: str, kind: str) -> str | None:
        """Returns the file's name for `kind` of a layer, which is called as the model calls it or the file."""
        return self._keys.get((root(layer), kind))

    def __len__(self) -> int:
        return len(self._keys)


@contextmanager
def opened(folder: Path) -> Iterator[Any]:
    """Opens the weights of an adapter folder.

    Raises:
        AdapterError: there are none that are safe to read, or damaged ones.
    """
    try:
        file = safe_open(folder / WEIGHTS, framework="pt")
    except FileNotFoundError:
        pickles = [name for name in ("adapter_model.bin", "adapter_model.pt") if (folder / name).exists()]
        if pickles:
            raise AdapterError(
                f"{folder} holds only pickled weights ({pickles[0]}), which can run code when read. Convert them once, "
                f"where you trust them: PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE), "
                f"'{folder}').save_pretrained(NEW), and give NEW as the adapter"
            ) from None
        raise AdapterError(f"no {WEIGHTS} in {folder}") from None
    except SafetensorError as error:
        raise AdapterError(f"{folder / WEIGHTS} is damaged or cut short: {error}") from None
    with file:
        yield file


def names_in(file: Any, folder: Path) -> TensorNames:
    """Returns the names of what `opened` gives."""
    return _parsed(tuple(file.keys()), folder / WEIGHTS)


@lru_cache(maxsize=4)
def _parsed(keys: tuple[str, ...], file: Path) -> TensorNames:
    return TensorNames(keys, file)

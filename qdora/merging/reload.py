"""Loads what a merge wrote with plain transformers, as a user would, and compares it with the adapted model.

Run by path in a process of its own, so that nothing of qdora is in it: `reload.py REQUEST`, a JSON file with

    folder, format          what was written, and as hf, nf4, gguf or lora
    base, dtype, quantise   of lora: the base to serve it on, its dtype, and whether in NF4 (double_quant: as it says)
    trust_remote_code       whether the checkpoint's own code may be run
    samples                 [{ids, learned, logits}]: token ids, which are learned, and a .npy file (tokens, vocabulary)
    result                  where the numbers go, as JSON
"""

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

CHUNK_NUMEL = 2**22
"""Logits compared at a time; in float64, several copies of them."""


class UnreadableError(Exception):
    """transformers has no reader for this."""


def load(request: dict[str, Any]) -> Any:
    """The written model.

    Raises:
        UnreadableError: transformers does not read GGUF files of this architecture.
    """
    options: dict[str, Any] = {"trust_remote_code": True} if request["trust_remote_code"] else {}
    if torch.cuda.is_available():
        options["device_map"] = "auto"
    from_pretrained = transformers.AutoModelForCausalLM.from_pretrained
    folder = request["folder"]
    if request["format"] == "lora":
        dtype = getattr(torch, request["dtype"])
        if request["quantise"]:
            options["quantization_config"] = transformers.BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=request["double_quant"],
                bnb_4bit_compute_dtype=dtype,
            )
        model = from_pretrained(request["base"], dtype=dtype, **options)
        add_adapter(model, Path(folder))
    elif request["format"] == "gguf":
        model = load_gguf(folder, request["base"], options)
    else:
        model = from_pretrained(folder, dtype="auto", **options)
    return model.eval()


def load_gguf(folder: str, base: str, options: dict[str, Any]) -> Any:
    """The model of a GGUF file, with the config of the base: its reader leaves out some, as Llama 3's rope scaling."""
    config = transformers.AutoConfig.from_pretrained(base)
    config.__dict__.pop("quantization_config", None)
    if config.model_type == "mistral":  # a Llama to llama.cpp, and the reader knows it by that name only
        config = None
    dequantise = transformers.GgufConfig(dequantize=True)
    try:
        return transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            gguf_file="model.gguf",
            quantization_config=dequantise,
            config=config,
            dtype=torch.float32,
            **options,
        )
    except (ValueError, NotImplementedError) as error:
        if isinstance(error, NotImplementedError) or "not supported" in str(error):
            raise UnreadableError(str(error)) from None
        raise


def add_adapter(model: nn.Module, folder: Path) -> None:
    """Makes the layers that `folder` names add s B A x to what they give.

    Raises:
        ValueError: a tensor that is none of LoRA's.
    """
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    scaling: float = config["lora_alpha"] / (math.sqrt(config["r"]) if config.get("use_rslora") else config["r"])
    tensors = load_file(folder / "adapter_model.safetensors")
    names = {key.removesuffix(".lora_A.weight") for key in tensors if key.endswith(".lora_A.weight")}
    expected = {f"{name}.{kind}.weight" for name in names for kind in ("lora_A", "lora_B")}
    if tensors.keys() != expected:
        raise ValueError(f"{folder} is not a LoRA adapter: it holds {min(tensors.keys() ^ expected)}")
    for name in names:
        layer = model.get_submodule(name.removeprefix("base_model.model."))
        a, b = tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"]

        def add(_: nn.Module, inputs: tuple[Tensor, ...], y: Tensor, a: Tensor = a, b: Tensor = b) -> Tensor:
            added: Tensor = inputs[0].to(y.dtype) @ a.to(y).T @ b.to(y).T
            return y + scaling * added

        layer.register_forward_hook(add)


@torch.inference_mode()
def compare(model: Any, samples: list[dict[str, Any]]) -> dict[str, float]:
    """Differences over all positions, and the mean loss of the learned tokens; not finite where a logit is not."""
    largest = torch.zeros((), dtype=torch.float64)
    difference, kl, agreed = torch.zeros(3, dtype=torch.float64).unbind()
    losses, worse = [], []
    count = num_logits = 0
    for sample in samples:
        ids = torch.tensor(sample["ids"])
        learned = torch.tensor(sample["learned"])
        stored = np.load(sample["logits"], mmap_mode="r")
        ours = model(input_ids=ids[None].to(model.device), use_cache=False).logits[0]
        if tuple(ours.shape) != stored.shape:
            raise ValueError(f"logits have the shape {tuple(ours.shape)}, the adapted model's are {stored.shape}")
        targets = ids.roll(-1)
        wanted = learned.roll(-1)
        wanted[-1] = False
        for some in torch.arange(len(ids)).split(max(1, CHUNK_NUMEL // ours.shape[1])):
            rows = slice(int(some[0]), int(some[-1]) + 1)
            mine, theirs = ours[rows].float(), torch.from_numpy(stored[rows].copy()).to(ours.device)
            apart = (mine - theirs).abs()
            log_q, log_p = mine.double().log_softmax(1), theirs.double().log_softmax(1)
            largest = torch.maximum(largest, apart.max().cpu())
            difference += apart.double().sum().cpu()
            kl += (log_p.exp() * (log_p - log_q)).sum().cpu()
            agreed += (mine.argmax(1) == theirs.argmax(1)).sum().cpu()
            theirs, mine = (log.cpu().gather(1, targets[rows, None])[wanted[rows]] for log in (log_p, log_q))
            losses.append(-mine)
            worse.append(theirs - mine)
        count, num_logits = count + len(ids), num_logits + ours.numel()
    return {
        "max_logit_difference": float(largest),
        "mean_logit_difference": float(difference) / num_logits,
        "mean_kl": float(kl) / count,
        "top1_agreement": float(agreed) / count,
        "merged_loss": float(torch.cat(losses).mean()),
        # Standard error of the mean by which the loss is higher: of two roundings one is better by chance.
        "loss_error": float(torch.cat(worse).std(correction=0)) / math.sqrt(len(torch.cat(worse))),
    }


def main() -> None:
    """Does what the request says."""
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    result: dict[str, Any] = {"versions": {"transformers": transformers.__version__, "torch": torch.__version__}}
    try:
        model = load(request)
    except UnreadableError as error:
        result["unreadable"] = str(error)
    else:
        result |= compare(model, request["samples"])
    Path(request["result"]).write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()

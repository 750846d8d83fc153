"""Tiny random models of real families, and their tokenizer."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

_COMMON: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "tie_word_embeddings": False},
    "llama-tied": {"model_type": "llama", "tie_word_embeddings": True},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": False},  # bias in q, k and v
    "qwen3": {"model_type": "qwen3", "head_dim": 32, "tie_word_embeddings": True},
    "mistral": {"model_type": "mistral", "head_dim": 32, "sliding_window": 64},
    "gemma3": {"model_type": "gemma3_text", "head_dim": 32, "sliding_window": 64, "query_pre_attn_scalar": 32},
    "phi3": {"model_type": "phi3", "tie_word_embeddings": False},
}
"""A tiny configuration of each kind of decoder; all with grouped-query attention."""


def make_model(
    folder: Path, family: str, *, seed: int = 0, dtype: torch.dtype = torch.bfloat16, **changes: Any
) -> Path:
    """Saves a tiny random model of `family` with a byte-like tokenizer to `folder`, which is returned.

    `max_shard_size` among `changes` cuts the checkpoint; the rest overrides the configuration.
    """
    max_shard_size = changes.pop("max_shard_size", "5GB")
    values = {**_COMMON, **FAMILIES[family], **changes}
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # transformers starts them at zero, which would hide a bias that is lost
            torch.nn.init.normal_(parameter, std=0.5)
        elif parameter.ndim == 2:  # larger than transformers' 0.02, so that logits differ
            torch.nn.init.normal_(parameter, std=0.08)
    model.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    make_tokenizer().save_pretrained(folder)
    return folder


def make_tokenizer(chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """One token a character (97 printable ones), `<pad>`, `<s>` and `</s>`; no chat template unless given."""
    characters = [chr(code) for code in range(32, 127)] + ["\n", "\t"]
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<s>", "</s>", "<unk>", *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    fast.chat_template = chat_template
    return fast


def byte_fallback() -> PreTrainedTokenizerFast:
    """A tokenizer as Llama 2's: blanks as U+2581, and bytes for what the vocabulary has not."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", *"Nnametrowki", "na"]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("n", "a")], unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("\u2581", "never", False)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")

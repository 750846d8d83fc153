"""Attention of packed rows, each sample by itself: no (tokens x tokens) mask is made, and none is read.

`varlen` is an attention implementation of transformers beside its own. Where the samples begin comes with each forward,
under the names by which transformers passes it to flash-attention (`cu_seq_lens_q`, `max_length_q`): a GPU is not asked
for it. The kernel on a GPU is torch's flash attention (arXiv:2307.08691) over rows of any length.
"""

import logging
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from qdora.errors import ModelError, first_line

logger = logging.getLogger(__name__)

NAME = "varlen"
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text", "phi3")
"""Types of text configs that `auto` takes it for: tests hold them to what a mask gives, windows and all."""
KNOWN = (
    *("sliding_window", "is_causal", "cu_seq_lens_k", "max_length_k"),
    *("position_ids", "position_embeddings", "use_cache", "output_attentions", "output_hidden_states"),
)
"""What transformers may pass to an attention and what is understood here, or matters not. All else has to be None."""


def bounds_of(position_ids: Tensor) -> tuple[Tensor, int]:
    """Where samples begin and the last one ends, (samples + 1,) int32, and the most tokens that one has.

    Args:
        position_ids: (rows, length) int64 on the host, 0 where a sample begins; the first of a row is.
    """
    begins = (position_ids.flatten() == 0).nonzero().squeeze(1).int()
    bounds = torch.cat([begins, begins.new_tensor([position_ids.numel()])])
    return bounds, int(bounds.diff().max())


def attend(
    query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, longest: int, scale: float, window: int | None
) -> Tensor:
    """Each token to those before it in its sample and itself, or to the last `window` of them.

    Args:
        query: (tokens, heads, head size).
        key, value: (tokens, heads or fewer, head size).
        bounds, longest: as `bounds_of` makes them, on the device.

    Returns:
        As `query`.
    """
    if query.is_cpu:
        return _one_by_one(query, key, value, bounds, scale, window)
    # As torch's own `varlen_attn` passes a window: to the last token itself, and not as causal.
    left, right = (None, None) if window is None else (window - 1, 0)
    out: Tensor = torch.ops.aten._flash_attention_forward(
        query,
        key,
        value,
        bounds,
        bounds,
        longest,
        longest,
        0.0,  # dropout
        window is None,
        False,  # return_debug_mask
        scale=scale,
        window_size_left=left,
        window_size_right=right,
    )[0]
    return out


def _one_by_one(query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, scale: float, window: int | None) -> Tensor:
    """The same by torch's attention, sample after sample."""
    parts = []
    for first, last in pairwise(bounds.tolist()):
        if first == last:
            continue
        q, k, v = (tensor[None, first:last].transpose(1, 2) for tensor in (query, key, value))
        mask = None
        if window is not None and last - first > window:
            mask = query.new_ones(last - first, last - first, dtype=torch.bool).tril().triu(1 - window)
        part = scaled_dot_product_attention(
            q, k, v, mask, is_causal=mask is None, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
        parts.append(part[0].transpose(0, 1))
    return torch.cat(parts)


def _forward(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """As transformers calls an attention: (rows, heads, length, head size); returns (rows, length, heads, head size).

    Where nobody says where samples begin, a row is one.

    Raises:
        ModelError: the model wants something of its attention that is not known here.
    """
    rows, length = query.shape[0], query.shape[2]
    wanted = [name for name, option in others.items() if name not in KNOWN and option is not None]
    wanted += ["dropout"] if dropout else []
    if others.get("is_causal") is False or not getattr(module, "is_causal", True) or attention_mask is not None:
        wanted.append("a mask")
    if "sliding_window" not in others and getattr(getattr(module, "config", None), "sliding_window", None):
        wanted.append("a window by its mask alone")
    if key.shape[2] != length or value.shape[-1] != query.shape[-1]:
        wanted.append("keys or values of another size")
    if wanted:
        raise ModelError(f"{type(module).__name__} wants {wanted[0]}, which model.attention={NAME} has not: use sdpa")
    if cu_seq_lens_q is None or max_length_q is None:
        cu_seq_lens_q = torch.arange(0, rows * length + 1, length, dtype=torch.int32, device=query.device)
        max_length_q = length
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    q, k, v = (tensor.transpose(1, 2).flatten(0, 1) for tensor in (query, key, value))
    out = attend(q, k, v, cu_seq_lens_q, max_length_q, scale, others.get("sliding_window") or None)
    return out.unflatten(0, (rows, length)), None


AttentionInterface.register(NAME, _forward)  # and no way to make masks: transformers then makes none


def missing(model: Any, device: torch.device, dtype: torch.dtype, known: bool) -> str | None:
    """Why the model cannot be trained with it on this device, or None. Computes a little there, if it is a GPU.

    Args:
        known: whether the model has to be of `FAMILIES`, and the device a GPU.
    """
    name, text = type(model).__name__, model.config.get_text_config()
    if known and (device.type != "cuda" or text.model_type not in FAMILIES):
        return f"{name} on a {device.type} has not been tried"
    if not model._can_set_attn_implementation():
        return f"{name} takes no attention but its own"
    if device.type == "cpu":
        return None
    if dtype is not torch.bfloat16:
        return "it computes in bfloat16 on a GPU"
    heads = text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    head_size = getattr(text, "head_dim", None) or text.hidden_size // heads
    return None if agrees(device, dtype, heads, kv_heads, head_size) else "torch's kernel does not compute it here"


def agrees(device: torch.device, dtype: torch.dtype, heads: int, kv_heads: int, head_size: int) -> bool:
    """Whether the device's kernel has the values and gradients of a CPU's; a warning says what it does instead.

    Raises:
        torch.OutOfMemoryError: the device is full.
    """
    generator = torch.Generator().manual_seed(0)
    bounds, longest = bounds_of(torch.cat([torch.arange(n) for n in (40, 1, 23)])[None])
    shapes = [(64, count, head_size) for count in (heads, kv_heads, kv_heads, heads)]
    values = [torch.randn(shape, generator=generator) for shape in shapes]
    for window in (None, 8):
        found = []
        try:
            for where in (device, torch.device("cpu")):
                q, k, v, upstream = (value.to(where, dtype, copy=True) for value in values)
                given = [tensor.requires_grad_() for tensor in (q, k, v)]
                out = attend(q, k, v, bounds.to(where), longest, head_size**-0.5, window)
                found.append([out.detach(), *torch.autograd.grad(out, given, upstream)])
            for ours, theirs in zip(*found, strict=True):
                torch.testing.assert_close(ours.cpu(), theirs, atol=0.05, rtol=0.05)
        except (RuntimeError, AssertionError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            logger.warning("torch's kernel for attention by samples fails on this device: %s", first_line(error))
            return False
    return True

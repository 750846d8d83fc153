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
UNKNOWN = ("softcap", "s_aux", "position_bias", "cache")
"""What transformers may ask of an attention and this one does not do; None where a model does not ask for it."""


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
    # A causal kernel would not look at the window.
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
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """As transformers calls an attention: (rows, heads, length, head size); returns (rows, length, heads, head size).

    Where nobody says where samples begin, a row is one.

    Raises:
        ModelError: the model wants something of its attention that is not known here.
    """
    wanted = [name for name in UNKNOWN if others.get(name) is not None]
    wanted += ["dropout"] if dropout else []
    wanted += ["a mask"] if attention_mask is not None or not getattr(module, "is_causal", True) else []
    wanted += ["values of another size than keys"] if value.shape[-1] != key.shape[-1] else []
    if wanted:
        raise ModelError(f"{type(module).__name__} wants {wanted[0]}, which model.attention={NAME} has not: use sdpa")
    rows, length = query.shape[0], query.shape[2]
    if cu_seq_lens_q is None or max_length_q is None:
        cu_seq_lens_q = torch.arange(0, rows * length + 1, length, dtype=torch.int32, device=query.device)
        max_length_q = length
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    q, k, v = (tensor.transpose(1, 2).flatten(0, 1) for tensor in (query, key, value))
    out = attend(q, k, v, cu_seq_lens_q, max_length_q, scale, sliding_window)
    return out.unflatten(0, (rows, length)), None


AttentionInterface.register(NAME, _forward)  # and no way to make masks: transformers then makes none


def suits(model: Any, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the model can be trained with it on this device. Computes a little there."""
    text = model.config.get_text_config()
    heads = text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    head_size = getattr(text, "head_dim", None) or text.hidden_size // heads
    return (
        device.type == "cuda"
        and dtype is torch.bfloat16
        and model._supports_flash_attn
        and getattr(text, "attn_logit_softcapping", None) is None
        and agrees(device, dtype, heads, kv_heads, head_size)
    )


def agrees(device: torch.device, dtype: torch.dtype, heads: int, kv_heads: int, head_size: int) -> bool:
    """Whether the device's kernel has the values and gradients of a CPU's; a warning says what it does instead."""
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
            logger.warning(
                "attention of packed rows takes a mask: torch's kernel for samples fails: %s", first_line(error)
            )
            return False
    return True
